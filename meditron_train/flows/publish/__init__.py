"""Publication of a model: weights, licenses, model card, signature and upload, checked before they have a name."""
