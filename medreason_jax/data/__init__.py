"""Records to packed, indexed batches."""
