"""What trained models answer to images of any size: in a notebook, for a folder of images, and exported."""

from medvision.prediction.predictor import Explainer, Heat, Predictor, Trained

__all__ = ["Explainer", "Heat", "Predictor", "Trained"]
