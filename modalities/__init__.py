"""Raw hospital data to per-patient features; one module per modality."""
