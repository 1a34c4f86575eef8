"""What a folder of source images holds: files, classes, masks, metadata sheets, the download of the database.

Decodes no pixels and writes no dataset.
"""
