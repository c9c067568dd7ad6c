"""Bytes against error of the codec, others' codecs beside it, and times."""
