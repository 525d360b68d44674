"""Readers, label tables, augmentation, collation and generated scenes."""
