"""Hold what every package uses: errors, configuration, mesh, parameters, files, progress."""
