"""Jobs from callers: the lifecycle of a job, the local server, the RunPod worker."""
