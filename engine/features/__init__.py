"""Features of whole volumes by a frozen encoder: `load_features(weights)`."""

from engine.features.extractor import FeatureExtractor, Features, load_features

__all__ = ["FeatureExtractor", "Features", "load_features"]
