"""How the demo model is made: data, two trainings, and the folder that ships. Run by `scripts/train_demo_model.py`."""
