"""Jobs in processes of their own: in turn, several at once on this machine, on a Ray cluster or by Slurm."""

from medvision.launchers.engines import InTurn, Job, Joblib, Ray, Slurm, Watch

__all__ = ["InTurn", "Job", "Joblib", "Ray", "Slurm", "Watch"]
