"""How a run is started where machines come and go: Slurm, Kubernetes JobSet, Ray Train."""
