"""What QEMU's monitor answers, recorded once, and whether kvmmig's answers the same."""
