"""Features to risk: survival statistics, encoders, late fusion and their federation."""
