"""The models: what travels to the Hub with a checkpoint. Nothing here imports anything of ours from outside."""
