"""One image file to one gray square: decoding (PNG, JPEG, TIFF, BMP, WebP, DICOM) and resizing.

Knows nothing of collections, splits or datasets.
"""
