"""Read outcomes of studies: from a store, or from a tracking server."""
