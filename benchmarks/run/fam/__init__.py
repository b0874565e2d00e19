"""FeatureActivationMap."""
