"""What `bench_peers` runs beside omni; each module says with which settings."""
