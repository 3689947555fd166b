"""Building blocks that every other package uses: errors, registries, files, sources, licences."""
