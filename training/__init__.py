"""Scripts that train and evaluate the models of `hf_custom`. Nothing here is imported by the package."""
