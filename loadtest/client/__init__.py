"""One streaming HTTP client: bytes in, stamped; events and tokens out."""
