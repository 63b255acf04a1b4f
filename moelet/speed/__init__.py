"""Speed beside that of peers and of the machine: `moelet bench`."""
