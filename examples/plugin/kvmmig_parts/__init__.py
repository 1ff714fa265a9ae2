"""``parts:`` and ``zlib+`` for kvmmig."""
