"""The anatomical embedding network (SAM): everything that turns volumes into correspondences."""
