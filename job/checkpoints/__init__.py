"""What outlives this machine: manifests, the lease, checkpoint upload, retention and restore."""
