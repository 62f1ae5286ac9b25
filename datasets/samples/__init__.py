"""From a store to batches: places, crops, views, masks, the loader."""
