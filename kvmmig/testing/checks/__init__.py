"""The checks of the conformance suite, a file for each thing that they are about."""
