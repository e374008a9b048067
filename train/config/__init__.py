"""The recipe of a run, in sections: what is learnt, from which images, by which steps."""

from latentgen.train.config.data import EmojiData as EmojiData
from latentgen.train.config.data import FolderData as FolderData
from latentgen.train.config.finetune import FinetuneTask as FinetuneTask
from latentgen.train.config.finetune import FullMethod as FullMethod
from latentgen.train.config.finetune import LoRAMethod as LoRAMethod
from latentgen.train.config.finetune import Prior as Prior
from latentgen.train.config.finetune import TextualInversionMethod as TextualInversionMethod
from latentgen.train.config.optimizer import Optimizer as Optimizer
from latentgen.train.config.run import FREE_FIELDS as FREE_FIELDS
from latentgen.train.config.run import TrainConfig as TrainConfig
from latentgen.train.config.run import in_one_line as in_one_line
from latentgen.train.config.run import load_config as load_config
from latentgen.train.config.tasks import AutoencoderTask as AutoencoderTask
from latentgen.train.config.tasks import Degradation as Degradation
from latentgen.train.config.tasks import DiffusionTask as DiffusionTask
from latentgen.train.config.tasks import LatentTask as LatentTask
from latentgen.train.config.tasks import PairedTask as PairedTask
from latentgen.train.config.tasks import TextToImageTask as TextToImageTask
from latentgen.train.config.tasks import UpscaleTask as UpscaleTask
