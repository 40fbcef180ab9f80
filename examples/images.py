"""Distils an image classifier with DistillationTrainer: python examples/images.py"""

from datasets import Dataset
from tiny import image_classifiers, images
from transformers import AutoModelForImageClassification, TrainingArguments

from fastdistill.train import DistillationTrainer, Objective

STUDENT, TEACHER = image_classifiers()  # replace by names or folders: "WinKawaks/vit-tiny-patch16-224", "google/..."

student = AutoModelForImageClassification.from_pretrained(STUDENT)
teacher = AutoModelForImageClassification.from_pretrained(TEACHER)
rows = Dataset.from_dict({"pixel_values": images(), "labels": [i % 4 for i in range(16)]})
args = TrainingArguments("output", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no")

# [distil]
# rows: pixel_values (3, H, W), which an image processor makes, and labels
how = {"terms": ("embedding", "hidden", "attention", "prediction"), "alpha": 0.5, "temperature": 2.0, "t_squared": True}
objective = Objective(student.config, teacher.config, **how)
trainer = DistillationTrainer(student, teacher, objective, args, train_dataset=rows)
trainer.train()
# [end]
