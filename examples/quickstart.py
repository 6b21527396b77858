# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Does a picture entail a sentence, or contradict it? A photo goes through a frozen ViT once, a
# sentence through the frozen layers of a DistilBERT once; what they compute is stored, and every
# experiment after that trains a small head on it.
#
# This takes a minute on two cores and downloads nothing: the scenes are drawn here, and the two
# small encoders ship with the package.

# %%
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow keeps its notes to itself

from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Image, display

import featstore
import trainer
from featstore.demo import DEMO_TRAIN, TEXT_PRESET, VIT_PRESET
from featstore.demo.scenes import write_demo

# %% [markdown]
# ## Photos and rows
#
# 1,000 scenes, six sentences each. A row is a photo's id, a sentence and a label; each sentence is
# true of as many scenes as it is false of, so that the words alone say nothing.

# %%
folder = Path("quickstart")
if not folder.exists():
    folder.mkdir()
    write_demo(folder, images=1000, seed=0)

rows = pd.read_json(folder / "rows.jsonl", lines=True)
rows[["Image_ID", "Hypothesis", "Label"]].head(6)

# %%
display(*(Image(folder / "images" / f"scene-000{i}.png", width=160) for i in range(2)))

# %% [markdown]
# ## A project
#
# It names rows, photos and encoders. The split is made by photo, so that none is in two parts.

# %%
project = featstore.Project(
    rows=str(folder / "rows.jsonl"),
    images=str(folder / "images"),
    vit=VIT_PRESET,
    text=TEXT_PRESET,
    root=str(folder / "cache"),
)
{split: len(project.dataset.rows(split)) for split in ("train", "val", "test")}

# %% [markdown]
# ## Features, once
#
# What is stored already is not made again: run this cell twice and the second time does nothing.
# `k_txt=0` asks for what the last text layer says; a run that trains the last three layers asks for
# what enters them.

# %%
project.extract("vit")
project.extract("text", k_txt=0)
photos, sentences = project.images(), project.sentences(k_txt=0)
print(f"{len(photos)} photos, each {photos.row_shape} in {photos.spec['dtype']}")
print(f"{len(sentences)} sentences, each (its tokens, {sentences.width})")

# %% [markdown]
# Both read like a mapping (`photos["scene-0000"]`). A split is a row set for loops of your own:
# PyTorch's `DataLoader` and Grain take it as it is, `to_tf_dataset()` is a method of it.

# %%
train_rows, test_rows = (project.features(split, k_txt=0) for split in ("train", "test"))
{name: (values.shape, values.dtype) for name, values in train_rows[0].items()}

# %% [markdown]
# ## A head of one's own
#
# `arrays()` gives one vector a row: the photo's tokens averaged, then the sentence's first token.
# Side by side in a logistic regression they know nothing of each other.

# %%
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

(x, y), (x_test, y_test) = train_rows.arrays(), test_rows.arrays()
beside = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(x, y)
print(f"{x.shape}, {x.dtype}; test accuracy {beside.score(x_test, y_test):.1%}")

# %% [markdown]
# Products of the two let a sentence choose what counts in the picture: a bilinear head, in NumPy.

# %%
width = photos.row_shape[1]
of_photo, of_sentence = (
    make_pipeline(StandardScaler(), PCA(size, whiten=True, random_state=0)).fit(part)
    for size, part in ((32, x[:, :width]), (24, x[:, width:]))
)


def products(x):
    """(rows, 32) photo × (rows, 24) sentence → (rows, 768)."""
    a, b = of_photo.transform(x[:, :width]), of_sentence.transform(x[:, width:])
    return np.einsum("ri,rj->rij", a, b).reshape(len(x), -1)


bilinear = LogisticRegression(C=0.003, max_iter=300).fit(products(x), y)
print(f"test accuracy {bilinear.score(products(x_test), y_test):.1%}")

# %% [markdown]
# ## The trained head
#
# Cross-attention from the sentence to the photo's patches, with the last three text layers training
# along. Each epoch reads the store, never a photo.

# %%
run = trainer.train(project, runs=folder / "runs", **DEMO_TRAIN | {"k_txt": 3, "epochs": 8})
run.history[["epoch", "loss", "val_loss", "val_accuracy", "seconds"]].round(3)

# %%
Image(run.curves_path)

# %% [markdown]
# ## Evaluate
#
# Every figure has a 95 % interval, bootstrapped over photos. With shuffled photos the same run must
# fall to chance if it is the picture that it reads.

# %%
found = run.evaluate("test")
values = found | found["at_threshold"]
pd.DataFrame(
    {
        name: {"value": values[name], **found["intervals"][name]}
        for name in ("accuracy", "macro_f1", "auc", "calibration_error")
    }
).T.round(3)

# %%
pd.Series(
    {
        "side by side": beside.score(x_test, y_test),
        "bilinear": bilinear.score(products(x_test), y_test),
        "trained": found["at_threshold"]["accuracy"],
        "trained, on shuffled photos": found["controls"]["shuffled-images"]["accuracy"],
    },
    name="test accuracy",
).map("{:.1%}".format).to_frame()

# %% [markdown]
# ## Explain
#
# Where the head looks, and what changes its answer. Shades of the first map are attention; in the
# others one colour speaks for entailment, the other against it.

# %%
explanation = run.explain(rows=2)
display(*(Image(path) for path in explanation.pngs(folder / "explained")))

# %% [markdown]
# ## Report
#
# All of it on one page that needs nothing else: send it, or open it in a browser.

# %%
Path(run.report()["page"])

# %% [markdown]
# Next: [your own data and encoder](your_data.ipynb).
