"""What survives this machine: manifests, the syncer that uploads, retention, and restore."""
