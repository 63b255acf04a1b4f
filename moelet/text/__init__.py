"""Where text comes from: sources, files, the hub, and documents with a place to go on from."""
