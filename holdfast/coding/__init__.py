"""Bytes in, bytes out: Reed-Solomon over GF(2^8), stripes, CRC32C, header codec. Knows nothing of torch or Ray."""
