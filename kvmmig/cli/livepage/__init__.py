"""The live page of ``kvmmig watch --web``: one machine's migration, for browsers on this host."""
