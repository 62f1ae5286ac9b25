"""Reading CT, data lists, the volume store, phantoms, correspondences, paired crops and masks."""
