"""Names of the files that a training run writes, in its work folder and in its artifact."""

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
DETECTIONS = "detections.jsonl"
"""One line per detector of PPO that changed its state."""
ENDED = "ended.json"
"""Why training ended before its last step; absent after a kill, and in artifacts."""
