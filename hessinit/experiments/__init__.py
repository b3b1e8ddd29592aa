"""The comparison: data, networks, initializers, training, tables and pictures."""
