"""One image file to one gray square: decoding (PNG, JPEG, DICOM, TIFF) and resizing.

Knows nothing of collections, splits or datasets.
"""
