"""Distils a sentence encoder in SentenceTransformerTrainer: python examples/sentence_transformers_losses.py"""

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tiny import encoders, texts

from fastdistill.integrations.sentence_transformers import EmbeddingMSELoss, TokenSimilarityLoss

STUDENT, TEACHER = encoders()  # replace by names or folders: "microsoft/MiniLM-L12-H384-uncased", "all-mpnet-base-v2"

student, teacher = SentenceTransformer(STUDENT), SentenceTransformer(TEACHER)
args = SentenceTransformerTrainingArguments(
    "output", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no"
)

# [similarity]
loss = TokenSimilarityLoss(student, teacher)
rows = Dataset.from_dict({"text": texts()})
SentenceTransformerTrainer(student, args, train_dataset=rows, loss=loss).train()
# [end]

# [mse]
loss = EmbeddingMSELoss(student, projection_dim=teacher.get_embedding_dimension())
rows = rows.map(lambda row: {"label": teacher.encode(row["text"])}, batched=True)
SentenceTransformerTrainer(student, args, train_dataset=rows, loss=loss).train()
loss.save_projection("projection.safetensors")  # if a later run goes on: checkpoints hold the student alone
# [end]
