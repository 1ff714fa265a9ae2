"""The laboratory: what records of migrations are read, drawn and compared with.

matplotlib and polars are extras (``pip install 'kvmmig[lab]'``), imported only where they are used.
"""
