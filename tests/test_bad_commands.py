"""Wrong commands: one line that says what was given, what is allowed and what to do; exit 2; nothing recorded."""

from __future__ import annotations

import gc
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from helpers.command import assert_refused, command

from flowdistill.cli import app
from flowdistill.methods import METHODS

LACKING = "mps" if torch.cuda.is_available() else "cuda"  # a device that this machine has not
WRONG = [
    # no such word
    ("trian", "No such command 'trian'. Did you mean 'train'? (flowdistill --help)"),
    ("--version=3", "Option '--version' does not take a value (flowdistill --help)"),
    ("--verbose", "No such option: --verbose (Possible options: --version) (flowdistill --help)"),
    ("train everything", "Got unexpected extra argument(s) (everything) (flowdistill --help)"),
    ("train --speed 9", "No such option: --speed (Possible options: --seeds, --set) (flowdistill --help)"),
    ("train --epoch 3", "No such option: --epoch (Possible options: --epochs) (flowdistill --help)"),
    # train: each option; the mistake stands last
    ("train --dataset digits --model resnt20", "unknown model 'resnt20': did you mean 'resnet20'?"),
    (
        "train --dataset digits --model alexnet",
        "unknown model 'alexnet': choose from: resnet8, resnet14, resnet20, resnet26, resnet32, resnet44, resnet56, resnet110, "
        "resnet8x4, resnet14x4, resnet32x4, resnet18, resnet34, resnet50, mobilenetv2, shufflenetv1, shufflenetv2, vgg8, vgg11, vgg13, "
        "vgg16, vgg19, wrn-16-1, wrn-16-2, wrn-40-1, wrn-40-2, wrn-28-10",
    ),
    ("train --dataset digits --model 1", "no run 1 in runs/ledger.db: it has no runs yet; flowdistill runs lists them"),
    ("train --model", "Option '--model' requires an argument (flowdistill --help)"),
    ("train --dataset digts", "unknown data set 'digts': did you mean 'digits'?"),
    ("train --dataset=", "--dataset is followed by nothing; give a value, or leave it out"),
    ("train --dataset npz:none.npz", "npz:none.npz: no such file"),
    (
        "train --dataset npz:~nobody-of-that-name/x.npz",
        "npz:~nobody-of-that-name/x.npz: no such file (Could not determine home directory.)",
    ),
    ("train --dataset digits --seeds 2-0", "--seeds '2-0': the range 2-0 runs backwards; write 0-2"),
    ("train --dataset digits --seeds a", "--seeds 'a': 'a' is no seed; write numbers and ranges such as 0-2,5"),
    ("train --dataset digits --seeds -1", "--seeds '-1': '-1' is no seed; write numbers and ranges such as 0-2,5"),
    ("train --dataset digits --seeds ''", "--seeds is followed by nothing; give a value, or leave it out"),
    ("train --dataset digits --seeds \u0661", "--seeds '\u0661': '\u0661' is no seed; write numbers and ranges such as 0-2,5"),
    (
        "train --dataset digits --seeds 1,0-2",
        "--seeds '1,0-2' names a seed twice; name each once",
    ),
    ("train --dataset digits --seeds 0-99999999999", "--seeds '0-99999999999': 100,000,000,000 seeds; one command takes at most 10,000"),
    ("train --dataset digits --seeds 0-9999,10000", "--seeds '0-9999,10000': 10,001 seeds; one command takes at most 10,000"),
    ("train --dataset digits --seeds 99999999999999999999", "seed=99999999999999999999: input should be less than 9223372036854775808"),
    ("train --dataset digits --epochs 0", "train.epochs=0: input should be greater than or equal to 1"),
    ("train --dataset digits --epochs -3", "train.epochs=-3: input should be greater than or equal to 1"),
    ("train --dataset digits --epochs 1.5", "--epochs='1.5': input should be a valid integer, unable to parse string as an integer"),
    ("train --dataset digits --epochs many", "--epochs='many': input should be a valid integer, unable to parse string as an integer"),
    (
        "train --dataset digits --epochs 99999999999999999999",
        "train.epochs=99999999999999999999: input should be less than or equal to 1000000",
    ),
    ("train --dataset digits --lr 0", "train.lr=0.0: input should be greater than 0"),
    ("train --dataset digits --lr -0.1", "train.lr=-0.1: input should be greater than 0"),
    ("train --dataset digits --lr nan", "train.lr=nan: input should be a finite number"),
    ("train --dataset digits --lr 1e400", "train.lr=inf: input should be a finite number"),
    ("train --dataset digits --lr fast", "--lr='fast': input should be a valid number, unable to parse string as a number"),
    ("train --dataset digits --batch-size 0", "train.batch_size=0: input should be greater than or equal to 1"),
    ("train --dataset digits --batch-size 899", "train.batch_size=899 is more than the 898 training images; set --batch-size lower"),
    (
        "train --dataset digits --batch-size 99999999999999999999",
        "train.batch_size=99999999999999999999 is more than the 898 training images; set --batch-size lower",
    ),
    (
        "train --dataset digits --batch-size half",
        "--batch-size='half': input should be a valid integer, unable to parse string as an integer",
    ),
    ("train --dataset digits --init-from resnet8", "init_from=resnet8: a model's name has no weights; name a run or a weights file"),
    ("train --dataset digits --init-from 1", "no run 1 in runs/ledger.db: it has no runs yet; flowdistill runs lists them"),
    (
        "train --dataset digits --runs taught --init-from 1",
        "init_from=1 is a resnet14, the student a resnet20; begin from a resnet20, or train a resnet14",
    ),
    (
        "train --dataset digits --model resnet8 --freeze stage1",
        "train.freeze=stage1: nothing in resnet8 is so named; it has: conv1, bn1, layer1, layer2, layer3, fc, and names below these",
    ),
    ("train --dataset digits --label-smoothing 1", "train.label_smoothing=1.0: input should be less than 1"),
    ("train --dataset digits --label-smoothing -0.1", "train.label_smoothing=-0.1: input should be greater than or equal to 0"),
    ("train --dataset digits --recipe crdd", "unknown recipe 'crdd': did you mean 'crd'?"),
    (
        "train --dataset digits --recipe best",
        "unknown recipe 'best': choose from: fsp-log, kd-zoo, crd, r110-warm, function-matching, deit, finetune, short, smoke",
    ),
    (
        "train --dataset digits --model vgg8 --recipe short",
        "--recipe short: student 'vgg8' is none of those that it was made for: resnet8, resnet14, resnet20, resnet26, resnet32, resnet44, "
        "resnet56, resnet110; choose another recipe",
    ),
    ("recipes --format TABLE", "--format='TABLE': not one of 'table', 'md', 'csv', 'json'"),
    ("train --dataset digits --workers -1", "--workers='-1': input should be greater than or equal to 0"),
    ("train --dataset digits --workers all", "--workers='all': input should be a valid integer, unable to parse string as an integer"),
    ("train --dataset digits --engine fast", "--engine='fast': not one of 'auto', 'eager', 'compiled', 'graph'"),
    ("train --dataset digits --precision fp16", "--precision='fp16': not one of 'auto', 'bf16', 'fp32'"),
    ("train --dataset digits --device gpu", "--device 'gpu' is not available here; use auto, or what this machine has of cpu, cuda, mps"),
    (
        "train --dataset digits --device cuda:99",
        "--device 'cuda:99' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    (
        f"train --dataset digits --device {LACKING}",
        f"--device '{LACKING}' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("train --dataset digits --device meta", "--device 'meta' is not available here; use auto, or what this machine has of cpu, cuda, mps"),
    ("train --dataset digits --deterministic=yes", "Option '--deterministic' does not take a value (flowdistill --help)"),
    (
        "train --dataset npz:few.npz --set data.pad=0 --batch-size 8 --holdout",
        "--holdout: a tenth of each class of few is no image; give it at least 5 images a class",
    ),
    ("train --dataset digits --holdout=0.1", "Option '--holdout' does not take a value (flowdistill --help)"),
    ("train --dataset digits --shard 4/3", "--shard 4/3: there is no shard 4 of 3; give one of 1/3 to 3/3"),
    ("train --dataset digits --shard 0/3", "--shard 0/3: there is no shard 0 of 3; give one of 1/3 to 3/3"),
    ("train --dataset digits --shard 0/0", "--shard 0/0: there is no shard 0 of 0; give one such as 1/5"),
    ("train --dataset digits --shard second", "--shard 'second' is no shard; write NUMBER/COUNT such as 1/5, or slurm in a job array"),
    (
        "train --dataset digits --shard slurm",
        "--shard slurm: SLURM_ARRAY_TASK_ID is not set to a number; start this as a job array (sbatch --array=1-5), or give --shard "
        "NUMBER/COUNT",
    ),
    (
        "train --dataset digits --ray 10.0.0.1",
        "--ray '10.0.0.1' is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local",
    ),
    (
        "train --dataset digits --ray ray://head:10001",
        "--ray 'ray://head:10001' is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local",
    ),
    ("train --dataset digits --ray=", "--ray is followed by nothing; give a value, or leave it out"),
    ("train --dataset digits --shard 1/2 --ray local", "--shard 1/2 and --ray local both divide the plan; give one of them"),
    (
        "train --dataset digits --storage shared",
        "--storage shared belongs to --ray; give --ray local, auto or HOST:PORT, or leave it out",
    ),
    ("train --dataset digits --again=3", "Option '--again' does not take a value (flowdistill --help)"),
    ("train --dataset digits --dry-run=no", "Option '--dry-run' does not take a value (flowdistill --help)"),
    ("train --dataset digits --config none.toml", "--config none.toml: no such file"),
    (
        "train --dataset digits --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    (
        "train --dataset digits --runs junk.txt/below/it",
        "junk.txt/below/it/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    ("train --dataset digits --runs ''", "--runs is followed by nothing; give a value, or leave it out"),
    # train --set: any key
    (
        "train --dataset digits --set train.momentum",
        "--set 'train.momentum': write key=value, such as train.lr=0.05 or options.fsp.pool=avg",
    ),
    ("train --dataset digits --set =3", "--set '=3': write key=value, such as train.lr=0.05 or options.fsp.pool=avg"),
    ("train --dataset digits --set train.momentun=0.9", "unknown key 'train.momentun': did you mean 'momentum'?"),
    ("train --dataset digits --set train.lr=true", "train.lr=True: input should be a valid number"),
    ("train --dataset digits --set train.lr=[0.1]", "train.lr=[0.1]: input should be a valid number"),
    ("train --dataset digits --set train.momentum=1", "train.momentum=1: input should be less than 1"),
    ("train --dataset digits --set train.batch_norm=sync", "train.batch_norm='sync': input should be 'local' or 'synchronised'"),
    (
        "train --dataset digits --set train.nesterov=true --set train.momentum=0",
        "train: nesterov=true needs a momentum above 0; set train.momentum or leave nesterov out",
    ),
    ("train --dataset digits --set train.epochs.x=3", "train.epochs: input should be a valid integer"),
    (
        "train --dataset digits --epochs 3 --set train=3",
        "train.epochs=3: 'train' is a single value here and has no keys below it; write a table of keys",
    ),
    (
        "train --dataset digits --set train.epochs=3 --set train.epochs.x=3",
        "train.epochs.x=3: 'epochs' is a single value here and has no keys below it; write a table of keys",
    ),
    ("train --dataset digits --set data.pad=16", "data.pad=16: reflection needs less than the image's 16 pixels; set data.pad lower"),
    ("train --dataset folder:it --set data.size=11586", "data.size=11586: input should be less than or equal to 11585"),
    ("train --dataset digits --set data.pad=-1", "data.pad=-1: input should be greater than or equal to 0"),
    ("train --dataset digits --set seed=-1", "seed=-1: input should be greater than or equal to 0"),
    ("train --dataset digits --set split=test", "split='test': input should be 'full' or 'holdout'"),
    (
        "train --dataset digits --set teacher=4",
        "teacher=4: training on the labels alone has none; use flowdistill distill, or leave it out",
    ),
    ("train --dataset digits --set options.fsp.pool=avg", "options.fsp: method 'base' has no such part; choose from: base"),
    ("train --dataset digits --set weights.kd=1", "weights.kd: method 'base' has no such term; choose from: task"),
    ("train --dataset digits --set weights.task=-1", "weights.task=-1.0: a weight is 0 or more"),
    (
        "train --dataset digits --set weights.task=0",
        "method 'base': every weight of its phase 'joint' is 0, so nothing would be trained; raise one",
    ),
    # distill: each option
    (
        "distill --dataset digits --runs taught --student 1 --teacher 1 --init-from 1",
        "init_from=1: student=1 has weights of its own; name its model alone: --student resnet14",
    ),
    (
        "distill --dataset digits --teacher resnet20 --freeze conv1,,bn1",
        "train.freeze='conv1,,bn1': a name is empty; write names with commas between them, such as conv1,bn1,layer1",
    ),
    ("distill --dataset digits --teacher resnet20 --method fps", "unknown method 'fps': did you mean 'fsp'?"),
    ("distill --dataset digits --teacher resnet20 --method ''", "--method is followed by nothing; give a value, or leave it out"),
    (
        "distill --dataset digits --teacher resnet20 --method fsp,",
        f"unknown method '': choose from: {', '.join(METHODS)}",
    ),
    ("distill --dataset digits --teacher resnet20 --method fsp,fsp", "--method fsp,fsp names a method twice; each is trained once a seed"),
    ("distill --dataset digits --teacher resnet20 --method kd+kd", "method 'kd+kd' names a part twice; give each once"),
    (
        "distill --dataset digits --teacher resnet20 --method base+kd",
        "method 'base+kd': 'base' is training on labels alone, which every method includes; leave it out",
    ),
    (
        "distill --dataset digits --teacher resnet20 --method at+ls:fsp",
        "method 'ls:fsp': fsp compares features, but ls: standardises the logits of both; put it before kd",
    ),
    ("distill --dataset digits --method ls:kd", "method 'ls:kd' needs a teacher: --teacher MODEL, RUN or FILE"),
    ("distill --dataset digits --method fsp", "method 'fsp' needs a teacher: --teacher MODEL, RUN or FILE"),
    ("distill --dataset digits --teacher resnet20 --student resnt8", "unknown model 'resnt8': did you mean 'resnet8'?"),
    (
        "distill --dataset digits --teacher resnet20 --student 7",
        "no run 7 in runs/ledger.db: it has no runs yet; flowdistill runs lists them",
    ),
    (
        "distill --dataset digits --student resnet8 --teacher resnet20",
        "no resnet20 was trained on digits (full split) yet; train one: flowdistill train --model resnet20 --dataset digits --seeds 100",
    ),
    ("distill --dataset digits --teacher resnt20", "unknown model 'resnt20': did you mean 'resnet20'?"),
    ("distill --dataset digits --teacher 7", "no run 7 in runs/ledger.db: it has no runs yet; flowdistill runs lists them"),
    (
        "distill --dataset digits --teacher 999999999999999999999999999999",
        "no run 999999999999999999999999999999 in runs/ledger.db: it has no runs yet; flowdistill runs lists them",
    ),
    ("distill --dataset digits --teacher none.safetensors", "weights file none.safetensors: no such file"),
    ("distill --dataset digits --teacher resnet20@", "weights file .: a folder, not a file; name a regular file"),
    (
        "distill --runs taught --dataset npz:small.npz --teacher 2",
        "run 2 is failed, not finished; choose a finished one (flowdistill runs --runs taught)",
    ),
    (
        "distill --runs taught --dataset npz:small.npz --student resnet14 --seeds 5 --teacher 1",
        "teacher 1 began from the initial weights of the student of seed 5, which may flatter it; use another --seeds or another teacher",
    ),
    (
        "distill --runs taught --dataset npz:small.npz --teacher 1 --holdout",
        "run 1 was trained on all of train, the held-out images among them; a holdout run takes networks of holdout "
        "runs (train one with --holdout)",
    ),
    (
        "distill --runs taught --dataset npz:small.npz --teacher resnet14 --holdout",
        "no resnet14 was trained on npz:small.npz (holdout split) yet; train one: flowdistill train --model resnet14 "
        "--dataset npz:small.npz --seeds 100 --holdout --runs taught",
    ),
    ("distill --teacher resnet20 --dataset cifar", "unknown data set 'cifar': did you mean 'cifar10'?"),
    ("distill --teacher resnet20 --dataset digits --seeds 1-", "--seeds '1-': '1-' is no seed; write numbers and ranges such as 0-2,5"),
    ("distill --teacher resnet20 --dataset digits --epochs 0", "train.epochs=0: input should be greater than or equal to 1"),
    ("distill --teacher resnet20 --dataset digits --lr inf", "train.lr=inf: input should be a finite number"),
    ("distill --teacher resnet20 --dataset digits --batch-size -1", "train.batch_size=-1: input should be greater than or equal to 1"),
    (
        "distill --teacher resnet20 --dataset digits --label-smoothing some",
        "--label-smoothing='some': input should be a valid number, unable to parse string as a number",
    ),
    (
        "distill --teacher resnet20 --method kd --dataset npz:none.npz --set weights.task=0 --label-smoothing 0.1",
        "train.label_smoothing=0.1 smooths the task, but weights.task=0; raise that, or leave smoothing out",
    ),
    ("distill --teacher resnet20 --dataset digits --recipe crdd", "unknown recipe 'crdd': did you mean 'crd'?"),
    *(
        (
            f"{words} --dataset npz:none.npz --recipe function-matching",
            f"train.mixup=true: mixed images have no labels, but method {method!r} learns from labels; choose one that does not, "
            f"such as kd, or set train.mixup=false",
        )
        for words, method in (
            ("train", "base"),
            ("distill --method base", "base"),
            ("distill --teacher resnet20 --method base,kd", "base"),
            ("distill --teacher resnet20 --method kd+dkd", "dkd"),
            ("distill --teacher resnet20 --method ls:wsld", "ls:wsld"),
        )
    ),
    (
        "distill --teacher resnet20 --method kd --dataset npz:none.npz --set train.mixup=true",
        "train.mixup=true: mixed images have no labels, but weights.task=1; set weights.task=0, or set train.mixup=false",
    ),
    (
        "distill --teacher resnet20 --method kd+dkd --dataset npz:none.npz --set train.mixup=0.2",
        "train.mixup=0.2: mixed images have two labels each, but method 'dkd' learns from labels; choose one that does not, such as kd, or "
        "set train.mixup=false",
    ),
    ("train --dataset npz:none.npz --set train.mixup=0.2", "npz:none.npz: no such file"),
    (
        "distill --teacher resnet20 --method kd+dkd --dataset npz:none.npz --set train.cutmix=1",
        "train.cutmix=1: mixed images have two labels each, but method 'dkd' learns from labels; choose one that does not, such as kd, or "
        "set train.cutmix=0",
    ),
    ("train --dataset npz:none.npz --set train.cutmix=1 --set train.class_weights=1,2.5", "npz:none.npz: no such file"),
    (
        "distill --teacher resnet20 --method kd --dataset npz:none.npz --set weights.task=0 --set train.class_weights=balanced",
        "train.class_weights weighs the classes in the task, but weights.task=0; raise that, or leave class_weights out",
    ),
    (
        "train --dataset digits --set train.class_weights=1,2,3",
        "train.class_weights: 3 numbers for the 10 classes of digits; give one for each",
    ),
    (
        "train --dataset digits --set train.class_weights=1,heavy",
        "train.class_weights='1,heavy': write none, balanced, or a number above 0 for each class, such as 1,2.5",
    ),
    *(
        (
            f"{words} --dataset npz:none.npz",
            f"data.unlabelled=folder:more: these images have no labels, but method {method!r} learns from labels; choose one that does "
            f"not, such as kd, or leave unlabelled out",
        )
        for words, method in (
            ("train --set data.unlabelled=folder:more", "base"),
            ("distill --unlabelled folder:more --method tf_kd", "tf_kd"),
            ("distill --unlabelled folder:more --teacher resnet20 --method base,kd", "base"),
            ("distill --unlabelled folder:more --teacher resnet20 --method kd+crd", "crd"),
            ("distill --unlabelled folder:more --teacher resnet20 --method nd", "nd"),
        )
    ),
    *(
        (
            f"{words} --unlabelled folder:more --teacher resnet20 --method {method}",
            f"data.unlabelled=folder:more without a data set: no image has a label, but method {method!r} learns from labels or from a "
            f"student's own logits; use methods on a teacher's features, such as radio or seed_kd, or name a labelled data set (--dataset)",
        )
        for words, method in (("distill", "tf_kd"), ("distill", "crd"), ("distill --dataset none", "dml"))
    ),
    (
        "distill --unlabelled folder:more --teacher resnet20 --method radio --probe",
        "probe=true: a classifier is fitted to labels, and there are none; leave it out, or name a labelled data set",
    ),
    (
        "distill --unlabelled folder:more --teacher resnet20 --method radio --holdout",
        "split=holdout: the held-out images choose the epoch by their labels, and there are none; use split=full",
    ),
    (
        "train --dataset none",
        "data: name=none stands for unlabelled images alone; give these as unlabelled, or name a data set",
    ),
    ("distill --unlabelled npz:none.npz --teacher resnet20 --method kd", "npz:none.npz: no such file"),
    (
        "distill --teacher resnet20 --method kd --dataset digits --unlabelled more",
        "data.unlabelled='more': write folder:PATH (image files, below it in any folders) or npz:PATH (uint8 images under the key x)",
    ),
    ("distill --teacher resnet20 --method kd --dataset digits --probe=3", "Option '--probe' does not take a value (flowdistill --help)"),
    ("doctor --teacher resnet20 --method kd --dataset digits --probe=3", "Option '--probe' does not take a value (flowdistill --help)"),
    (
        "distill --teacher resnet20@pretrained --method kd --dataset digits",
        "resnet20@pretrained: nobody publishes weights of resnet20; write timm:NAME.TAG, timm:NAME@pretrained, torchvision:NAME@DEFAULT or "
        "hf-hub:ORG/NAME, or resnet20@./pretrained for a file of that name",
    ),
    (
        "train --model timm:test_coatnet@pretrained --dataset digits",
        "timm:test_coatnet@pretrained: timm publishes no weights of test_coatnet; write timm:test_coatnet for fresh ones",
    ),
    (
        "train --model timm:resnet18.a1_in --dataset digits",
        "timm:resnet18.a1_in: timm publishes no such weights of resnet18; did you mean 'a1_in1k'?",
    ),
    (
        "train --model timm:resnet18 --init-from timm:resnet18.a1_in --dataset digits",
        "timm:resnet18.a1_in: timm publishes no such weights of resnet18; did you mean 'a1_in1k'?",
    ),
    ("distill --teacher resnet20 --method kd --dataset digits --unlabelled npz:none.npz", "npz:none.npz: no such file"),
    ("distill --teacher resnet20 --method kd --dataset digits --unlabelled folder:none", "folder:none: no such folder; write folder:PATH"),
    (
        "distill --teacher resnet20 --method kd --dataset digits --unlabelled npz:few.npz",
        "npz:few.npz: key 'x' is missing; it has ['x_test', 'x_train', 'y_test', 'y_train'], needs ['x']",
    ),
    (
        "distill --teacher resnet20 --method kd --dataset digits --unlabelled npz:more.npz",
        "npz:more.npz: its images are 8x8x3, those of digits 16x16x1; give images of that size",
    ),
    (
        "distill --teacher resnet20 --method kd --dataset digits --unlabelled folder:.",
        "folder:.: no image (.bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp) is in it; name a folder with images",
    ),
    (
        "train --dataset digits --set train.mixup=-1",
        "train.mixup=-1: true mixes without labels, a number above 0 with them: alpha of Beta(alpha, alpha), such as 0.2; or false",
    ),
    (
        "distill --teacher resnet20 --method kd --dataset npz:none.npz --recipe function-matching --set data.pad=2",
        "data: pad=2 belongs to crop=shift; leave one of them out",
    ),
    ("distill --teacher resnet20 --dataset digits --workers 257", "--workers='257': input should be less than or equal to 256"),
    ("distill --teacher resnet20 --dataset digits --engine fast", "--engine='fast': not one of 'auto', 'eager', 'compiled', 'graph'"),
    ("distill --teacher resnet20 --dataset digits --precision bf8", "--precision='bf8': not one of 'auto', 'bf16', 'fp32'"),
    (
        "distill --teacher resnet20 --dataset digits --device tpu",
        "--device 'tpu' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    (
        "distill --teacher resnet20 --dataset digits --deterministic=1",
        "Option '--deterministic' does not take a value (flowdistill --help)",
    ),
    ("distill --teacher resnet20 --dataset digits --shard 4/3", "--shard 4/3: there is no shard 4 of 3; give one of 1/3 to 3/3"),
    (
        "distill --teacher resnet20 --dataset digits --ray head:0",
        "--ray 'head:0' is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local",
    ),
    (
        "distill --teacher resnet20 --dataset digits --storage shared",
        "--storage shared belongs to --ray; give --ray local, auto or HOST:PORT, or leave it out",
    ),
    ("distill --teacher resnet20 --dataset digits --again=all", "Option '--again' does not take a value (flowdistill --help)"),
    ("distill --teacher resnet20 --dataset digits --dry-run=1", "Option '--dry-run' does not take a value (flowdistill --help)"),
    (
        "distill --teacher resnet20 --dataset digits --config junk.txt",
        "--config junk.txt: neither TOML nor a JSON object (Expected '=' after a key in a key/value pair (at end of document))",
    ),
    ("distill --teacher resnet20 --dataset digits --runs", "Option '--runs' requires an argument (flowdistill --help)"),
    ("distill --dataset digits --teacher resnet20 --student-taps none.csv", "taps none.csv: no such file"),
    (
        "distill --dataset digits --teacher resnet20 --teacher-taps junk.txt",
        "taps junk.txt: no table with the columns name and module; write one with flowdistill taps MODEL --format csv",
    ),
    # distill --set: what only a method has
    (
        "distill --teacher resnet20 --dataset digits --method fsp --set options.fsp.pool=min",
        "options.fsp.pool='min': input should be 'max' or 'avg'",
    ),
    (
        "distill --teacher resnet20 --dataset digits --method fsp --set options.fsp.pol=avg",
        "unknown key 'options.fsp.pol': did you mean 'pool'?",
    ),
    (
        "distill --teacher resnet20 --dataset digits --method fsp --set options.fsp.stage_epochs=3",
        "options.fsp: stage_epochs belongs to schedule=two-stage; set that too, or leave it out",
    ),
    ("distill --teacher resnet20 --dataset digits --method kd --set options.kd.T=0", "options.kd.T=0: input should be greater than 0"),
    (
        "distill --teacher resnet20 --dataset digits --method crd --set options.crd.negatives=0",
        "options.crd.negatives=0: input should be greater than or equal to 1",
    ),
    ("distill --dataset digits --method dml --set options.dml.T=2", "unknown key 'options.dml.T': there is none to choose from"),
    ("distill --dataset digits --method dml --set side=3", "side=3: input should be 1 or 2"),
    ("distill --dataset digits --method dml --set peer=resnet21", "unknown model 'resnet21': did you mean 'resnet32'?"),
    (
        "distill --teacher resnet20 --dataset digits --method kd --set peer=resnet8",
        "peer=resnet8: the students of 'kd' do not teach each other; use dml, or leave peer out",
    ),
    ("distill --dataset digits --method simkd", "method 'simkd' needs a teacher: --teacher MODEL, RUN or FILE"),
    (
        "distill --teacher 'reused(resnet8)' --dataset digits --method kd",
        "model 'reused(resnet8)': write reused(STUDENT,TEACHER,FACTOR) with registered models, such as reused(resnet8,resnet20,2)",
    ),
    (
        "distill --teacher resnet20 --dataset digits --method at+fsp --set options.kd.T=2",
        "options.kd: method 'at+fsp' has no such part; choose from: at, fsp",
    ),
    (
        "distill --teacher resnet20 --dataset digits --method base,fsp --set options.fps.pool=avg",
        "options.fps: none of base, fsp has it; did you mean 'fsp'?",
    ),
    ("distill --teacher resnet20 --dataset digits --method base,fsp --set options=3", "options=3: must be a table of keys"),
    (
        "distill --teacher resnet20 --dataset digits --method fsp --set weights.at=1",
        "weights.at: method 'fsp' has no such term; choose from: task, fsp",
    ),
    # doctor: what it can look at has findings (tests/test_doctor.py); refused is what can't be understood, or no data or student
    ("doctor --method ''", "--method is followed by nothing; give a value, or leave it out"),
    ("doctor --dataset digits --teacher resnet20 --method kd,kd", "--method kd,kd names a method twice; each is trained once a seed"),
    ("doctor --dataset digits --teacher resnet20 --student resnt8", "unknown model 'resnt8': did you mean 'resnet8'?"),
    ("doctor --dataset digits --method kd --teacher=", "--teacher is followed by nothing; give a value, or leave it out"),
    ("doctor --dataset digits --teacher resnet20 --student-taps none.csv", "taps none.csv: no such file"),
    (
        "doctor --dataset digits --teacher resnet20 --teacher-taps junk.txt",
        "taps junk.txt: no table with the columns name and module; write one with flowdistill taps MODEL --format csv",
    ),
    (
        "doctor --teacher resnet20 --method kd --dataset digits --unlabelled more",
        "data.unlabelled='more': write folder:PATH (image files, below it in any folders) or npz:PATH (uint8 images under the key x)",
    ),
    ("doctor --teacher resnet20 --dataset digts", "unknown data set 'digts': did you mean 'digits'?"),
    ("doctor --teacher resnet20 --dataset digits --seeds 1-", "--seeds '1-': '1-' is no seed; write numbers and ranges such as 0-2,5"),
    ("doctor --teacher resnet20 --dataset digits --epochs 0", "train.epochs=0: input should be greater than or equal to 1"),
    ("doctor --teacher resnet20 --dataset digits --lr inf", "train.lr=inf: input should be a finite number"),
    ("doctor --teacher resnet20 --dataset digits --batch-size 0", "train.batch_size=0: input should be greater than or equal to 1"),
    (
        "doctor --teacher resnet20 --dataset digits --init-from resnet8",
        "init_from=resnet8: a model's name has no weights; name a run or a weights file",
    ),
    (
        "doctor --teacher resnet20 --dataset digits --freeze conv1,,bn1",
        "train.freeze='conv1,,bn1': a name is empty; write names with commas between them, such as conv1,bn1,layer1",
    ),
    ("doctor --teacher resnet20 --dataset digits --label-smoothing 1", "train.label_smoothing=1.0: input should be less than 1"),
    ("doctor --teacher resnet20 --dataset digits --precision bf8", "--precision='bf8': not one of 'auto', 'bf16', 'fp32'"),
    ("doctor --teacher resnet20 --dataset digits --rates=3", "Option '--rates' does not take a value (flowdistill --help)"),
    ("doctor --teacher resnet20 --dataset digits --holdout=1", "Option '--holdout' does not take a value (flowdistill --help)"),
    ("doctor --teacher resnet20 --dataset digits --recipe crdd", "unknown recipe 'crdd': did you mean 'crd'?"),
    ("doctor --teacher resnet20 --dataset digits --config none.toml", "--config none.toml: no such file"),
    ("doctor --teacher resnet20 --dataset digits --set train.momentun=0.9", "unknown key 'train.momentun': did you mean 'momentum'?"),
    (
        "doctor --teacher resnet20 --dataset digits --device tpu",
        "--device 'tpu' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("doctor --teacher resnet20 --dataset digits --format xls", "--format='xls': not one of 'table', 'md', 'csv', 'json'"),
    (
        "doctor --teacher resnet20 --dataset digits --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    # bench
    ("bench --pairs resnet8", "--pairs 'resnet8': write STUDENT:TEACHER, such as resnet8:resnet20"),
    ("bench --pairs resnet8:resnt20", "unknown model 'resnt20': did you mean 'resnet20'?"),
    ("bench --pairs ''", "--pairs is followed by nothing; give a value, or leave it out"),
    ("bench --methods fsp,", "--methods 'fsp,' names nothing between two commas; write a,b"),
    ("bench --methods fps", "unknown method 'fps': did you mean 'fsp'?"),
    ("bench --engines auto", "--engines 'auto': choose from: eager, compiled, graph, graph+compiled"),
    ("bench --precisions fp16", "--precisions 'fp16': did you mean 'bf16'?"),
    ("bench --cohorts 1", "--cohorts 1: seeds together are two or more; one alone is always timed"),
    ("bench --cohorts few", "--cohorts 'few': write numbers with commas, such as 3,8"),
    ("bench --batch-size 1", "--batch-size='1': input should be greater than or equal to 2"),
    ("bench --steps 400", "--steps 400 of 128 images: an epoch here has 50,000; set --steps lower"),
    ("bench --rounds 0", "--rounds='0': input should be greater than or equal to 1"),
    ("bench --workers -1", "--workers='-1': input should be greater than or equal to 0"),
    ("bench --device tpu", "--device 'tpu' is not available here; use auto, or what this machine has of cpu, cuda, mps"),
    ("bench --json=3", "Option '--json' does not take a value (flowdistill --help)"),
    # reproduce
    ("reproduce", "Missing argument 'study' (flowdistill --help)"),
    ("reproduce fsp-lgo", "unknown study 'fsp-lgo': did you mean 'fsp-log'?"),
    ("reproduce x", "unknown study 'x': choose from: log, fsp-log"),
    ("reproduce log --only resnet20-cifar", "--only 'resnet20-cifar' is no setting of log: did you mean 'resnet20-cifar10'?"),
    ("reproduce log --methods fps", "unknown method 'fps': did you mean 'fsp'?"),
    ("reproduce log --methods fsp,kd+", f"unknown method '': choose from: {', '.join(METHODS)}"),
    ("reproduce log --methods ''", "--methods is followed by nothing; give a value, or leave it out"),
    ("reproduce log --methods kd+at,fsp,at+kd", "--methods kd+at,fsp,at+kd names at+kd twice; each row is trained once"),
    ("reproduce log --methods fsp,ft+ab", "method 'ab+ft': ab and ft both train in stages; only one part may"),
    (
        "reproduce log --methods fsp,dml",
        "--methods dml: its students teach each other, and a row has one teacher for each; leave it out",
    ),
    ("reproduce log --recipe fsp-lgo", "unknown recipe 'fsp-lgo': did you mean 'fsp-log'?"),
    (
        "reproduce log --recipe function-matching",
        "--recipe function-matching: it trains without labels, from which the baselines, the teachers, learn; choose another",
    ),
    ("reproduce log --seeds 0,0", "--seeds '0,0' names a seed twice; name each once"),
    ("reproduce log --baselines 1-0", "--baselines '1-0': the range 1-0 runs backwards; write 0-1"),
    (
        "reproduce log --baselines 0",
        "--baselines 0: the student of seed 0 would have no teacher but the one that began from its own initial weights; name another seed",
    ),
    ("reproduce log --epochs 0 --cifar10 npz:small.npz", "train.epochs=0: input should be greater than or equal to 1"),
    (
        "reproduce fsp-log --methods fsp",
        "--methods belongs to the study log, and fsp-log has rows, recipe and seeds of its own; leave it out",
    ),
    (
        "reproduce fsp-log --recipe crd",
        "--recipe belongs to the study log, and fsp-log has rows, recipe and seeds of its own; leave it out",
    ),
    ("reproduce fsp-log --seeds 1", "--seeds belongs to the study log, and fsp-log has rows, recipe and seeds of its own; leave it out"),
    (
        "reproduce fsp-log --baselines 1",
        "--baselines belongs to the study log, and fsp-log has rows, recipe and seeds of its own; leave it out",
    ),
    (
        "reproduce log --out junk.txt",
        "junk.txt: the document cannot be written there (junk.txt is a file); name another folder with --out",
    ),
    ("reproduce fsp-log --only resnet20-cifar", "--only 'resnet20-cifar' is no setting of fsp-log: did you mean 'resnet20-cifar10'?"),
    (
        "reproduce fsp-log --only vgg",
        "--only 'vgg' is no setting of fsp-log: choose from: resnet20-cifar10, resnet20-cifar100, resnet110-cifar10, resnet110-cifar100",
    ),
    ("reproduce fsp-log --only ''", "--only is followed by nothing; give a value, or leave it out"),
    ("reproduce fsp-log --cifar10 npz:none.npz", "npz:none.npz: no such file"),
    ("reproduce fsp-log --only resnet20-cifar100 --cifar100 npz:none.npz", "npz:none.npz: no such file"),
    ("reproduce fsp-log --epochs 0", "train.epochs=0: input should be greater than or equal to 1"),
    ("reproduce fsp-log --limit-train 0", "data.limit_train=0: input should be greater than or equal to 1"),
    (
        "reproduce fsp-log --limit-train some",
        "--limit-train='some': input should be a valid integer, unable to parse string as an integer",
    ),
    ("reproduce fsp-log --precision fp8", "--precision='fp8': not one of 'auto', 'bf16', 'fp32'"),
    (
        "reproduce fsp-log --device cuda:99",
        "--device 'cuda:99' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("reproduce fsp-log --dry-run=yes", "Option '--dry-run' does not take a value (flowdistill --help)"),
    (
        "reproduce fsp-log --out junk.txt",
        "junk.txt: the document cannot be written there (junk.txt is a file); name another folder with --out",
    ),
    (
        "reproduce fsp-log --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    # listings
    ("demo --runs junk.txt", "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs"),
    ("demo --format html", "--format='html': not one of 'table', 'md', 'csv', 'json'"),
    ("demo fast", "Got unexpected extra argument(s) (fast) (flowdistill --help)"),
    ("table", "no ledger in runs: train something first (flowdistill demo --runs runs), or name its folder with --runs"),
    ("table --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    ("table --summary=yes", "Option '--summary' does not take a value (flowdistill --help)"),
    ("table --protocol median", "--protocol='median': not one of 'last', 'best', 'holdout'"),
    ("table --metric f1", "--metric='f1': not one of 'top1', 'top5', 'macro-f1', 'balanced-accuracy'"),
    (
        "table --runs taught --metric top5 --protocol best",
        "--metric top5 --protocol best: that epoch is the best by top-1, and top-1 alone is on record of it; "
        "choose --protocol last, or --metric top1",
    ),
    ("table --format xls", "--format='xls': not one of 'table', 'md', 'csv', 'json'"),
    ("table --runs taught --method fps", "unknown method 'fps': did you mean 'fsp'?"),
    ("table --runs taught --dataset smal", "--dataset 'smal': no run here has it; did you mean 'small'?"),
    ("table --runs taught --student resnet9", "unknown model 'resnet9': did you mean 'resnet8'?"),
    (
        "table --runs taught --teacher nobody",
        "unknown model 'nobody': choose from: resnet8, resnet14, resnet20, resnet26, resnet32, resnet44, resnet56, resnet110, "
        "resnet8x4, resnet14x4, resnet32x4, resnet18, resnet34, resnet50, mobilenetv2, shufflenetv1, shufflenetv2, vgg8, vgg11, vgg13, "
        "vgg16, vgg19, wrn-16-1, wrn-16-2, wrn-40-1, wrn-40-2, wrn-28-10",
    ),
    (
        "table --runs junk.txt",
        "junk.txt is no ledger's export; name a folder of runs, or a file that flowdistill ledger export junk.txt wrote",
    ),
    ("record", "no ledger in runs: train something first (flowdistill demo --runs runs), or name its folder with --runs"),
    ("record fsp", "Got unexpected extra argument(s) (fsp) (flowdistill --help)"),
    (
        "record --runs taught --runs junk.txt",
        "junk.txt is no ledger's export; name a folder of runs, or a file that flowdistill ledger export junk.txt wrote",
    ),
    ("record --to 101", "--to='101': input should be less than or equal to 100"),
    ("record --to fast", "--to='fast': input should be a valid number, unable to parse string as a number"),
    ("record --to nan", "--to='nan': input should be less than or equal to 100"),
    ("record --runs taught --plain none.json", "--plain none.json: no such file"),
    (
        "record --runs taught --plain junk.txt",
        "--plain junk.txt: it is not what flowdistill bench --json prints; give a file of that",
    ),
    ("record --runs taught --check none.md", "--check none.md: no such file"),
    (
        "record --runs taught --format csv --check junk.txt",
        "junk.txt does not fit its ledger: line 1 has 'junk', the ledger gives 'dataset,student,method,variant'; write it again",
    ),
    ("record --protocol median", "--protocol='median': not one of 'last', 'best', 'holdout'"),
    ("record --format xls", "--format='xls': not one of 'table', 'md', 'csv', 'json'"),
    ("record --runs taught --method fps", "unknown method 'fps': did you mean 'fsp'?"),
    ("record --runs taught --dataset smal", "--dataset 'smal': no run here has it; did you mean 'small'?"),
    ("record --runs taught --student resnet9", "unknown model 'resnet9': did you mean 'resnet8'?"),
    ("record --runs taught --teacher resnet9", "unknown model 'resnet9': did you mean 'resnet8'?"),
    ("ledger export", "Missing argument 'file' (flowdistill --help)"),
    ("ledger export --runs taught taught", "taught: the export cannot be written there (it is not a file); name another file"),
    ("ledger export --runs taught none.jsonl --check", "none.jsonl: no such file"),
    (
        "ledger export --runs taught junk.txt --check",
        "junk.txt is no ledger's export; name a folder of runs, or a file that flowdistill ledger export junk.txt wrote",
    ),
    ("runs --format TABLE", "--format='TABLE': not one of 'table', 'md', 'csv', 'json'"),
    ("runs --last 0", "--last='0': input should be greater than or equal to 1"),
    ("runs --last many", "--last='many': input should be a valid integer, unable to parse string as an integer"),
    ("runs --all=yes", "Option '--all' does not take a value (flowdistill --help)"),
    ("reproduce log --ray head:0", "--ray 'head:0' is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local"),
    ("reproduce log --storage shared", "--storage shared belongs to --ray; give --ray local, auto or HOST:PORT, or leave it out"),
    ("reproduce log --shard 4/3", "--shard 4/3: there is no shard 4 of 3; give one of 1/3 to 3/3"),
    ("ledger merge --into all", "Missing argument 'DIR...' (flowdistill --help)"),
    ("ledger merge taught", "Missing option '--into' (flowdistill --help)"),
    ("ledger merge taught --into", "Option '--into' requires an argument (flowdistill --help)"),
    ("ledger merge taught --into all --format xls", "--format='xls': not one of 'table', 'md', 'csv', 'json'"),
    ("ledger merge taught --into taught", "taught is the ledger that is merged into; leave it out, or name another folder with --into"),
    ("ledger merge taught ./taught --into all", "taught is named twice; name each ledger once"),
    (
        "ledger merge none --into all",
        "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs",
    ),
    (
        "ledger merge taught --into junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    ("ledger mend", "No such command 'mend' (flowdistill --help)"),
    ("ledger rebuild --format TABLE", "--format='TABLE': not one of 'table', 'md', 'csv', 'json'"),
    ("ledger rebuild --runs junk.txt", "no folder in junk.txt says what its run was; there is nothing to make a ledger of"),
    (
        "runs --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    ("methods fspp", "unknown method 'fspp': did you mean 'fsp'?"),
    ("methods fsp+kd", "unknown method 'fsp+kd': did you mean 'fsp'?"),
    ("methods --format pdf", "--format='pdf': not one of 'table', 'md', 'csv', 'json'"),
    ("models resnet20 resnet8", "Got unexpected extra argument(s) (resnet8) (flowdistill --help)"),
    ("models --format pdf", "--format='pdf': not one of 'table', 'md', 'csv', 'json'"),
    ("config train.lrr", "config 'train.lrr': no key has such a name; did you mean 'train.lr'?"),
    ("config train.lr data.pad", "Got unexpected extra argument(s) (data.pad) (flowdistill --help)"),
    ("config --format pdf", "--format='pdf': not one of 'table', 'md', 'csv', 'json'"),
    ("datasets --format pdf", "--format='pdf': not one of 'table', 'md', 'csv', 'json'"),
    ("models resnut*", "models 'resnut*': no network has such a name; did you mean 'resnet8'?"),
    ("taps", "Missing argument 'model' (flowdistill --help)"),
    ("taps resnt20", "unknown model 'resnt20': did you mean 'resnet20'?"),
    ("taps resnet20 --size 0", "--size='0': input should be greater than or equal to 1"),
    ("taps resnet20 --channels 0", "--channels='0': input should be greater than or equal to 1"),
    ("taps resnet20 --classes 1", "--classes='1': input should be greater than or equal to 2"),
    ("taps resnet20 --format xls", "--format='xls': not one of 'table', 'md', 'csv', 'json'"),
    ("taps 1 --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    # one run
    ("show", "Missing argument 'run' (flowdistill --help)"),
    ("show 1 --plot curves.pdf", "--plot curves.pdf: the name must end in .svg or .png"),
    ("table --plot curves", "--plot curves: the name must end in .svg or .png"),
    ("show one", "run='one': input should be a valid integer, unable to parse string as an integer"),
    ("show 1.5", "run='1.5': input should be a valid integer, unable to parse string as an integer"),
    ("show -1", "No such option: -1 (flowdistill --help)"),
    ("show --runs taught 0", "no run 0 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("show --runs taught 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    (
        "show --runs taught 99999999999999999999",
        "no run 99999999999999999999 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them",
    ),
    ("show 1 2", "Got unexpected extra argument(s) (2) (flowdistill --help)"),
    ("show 1 --format yaml", "--format='yaml': not one of 'table', 'md', 'csv', 'json'"),
    ("show 1 --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    ("resume one", "run='one': input should be a valid integer, unable to parse string as an integer"),
    ("resume 1 2", "Got unexpected extra argument(s) (2) (flowdistill --help)"),
    ("resume --runs taught 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("resume --runs taught 1", "run 1 is finished; only what was cut off can be resumed, to repeat it use --again"),
    (
        "resume --runs taught 2 --device cuda:99",
        "--device 'cuda:99' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("resume --runs taught 2 --workers few", "--workers='few': input should be a valid integer, unable to parse string as an integer"),
    ("resume --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    ("evaluate", "Missing argument 'RUN|FILE' (flowdistill --help)"),
    ("evaluate ''", "evaluate is followed by nothing; give a value, or leave it out"),
    ("evaluate none.safetensors", "weights file none.safetensors: no such file"),
    ("evaluate 7", "no ledger in runs: train something first (flowdistill demo --runs runs), or name its folder with --runs"),
    ("evaluate --runs taught 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("evaluate --runs taught 2", "weights file taught/2/student.safetensors: no such file"),
    ("evaluate --runs taught 1 --workers -2", "--workers='-2': input should be greater than or equal to 0"),
    (
        "evaluate --runs taught 1 --dataset digits",
        "taught/1/student.safetensors was trained on 1x8x8 images of 10 classes; digits has 1x16x16 of 10; choose a data set of that shape",
    ),
    (
        "evaluate --runs taught 1 --dataset mnist",
        "unknown data set 'mnist': choose from: digits, cifar10, cifar100, fashion_mnist, npz:PATH, folder:PATH, csv:FILE, hf:NAME",
    ),
    ("evaluate --runs taught 1 --precision fp64", "--precision='fp64': not one of 'auto', 'bf16', 'fp32'"),
    (
        "evaluate --runs taught 1 --device cuda:99",
        "--device 'cuda:99' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("evaluate --runs taught 1 --format txt", "--format='txt': not one of 'table', 'md', 'csv', 'json'"),
    ("evaluate --runs taught 1 --probe cosine", "--probe='cosine': not one of 'knn', 'linear'"),
    ("evaluate --runs taught 1 --probe", "Option '--probe' requires an argument (flowdistill --help)"),
    ("evaluate --runs taught 1 --probe knn --k 0", "--k='0': input should be greater than or equal to 1"),
    ("evaluate --runs taught 1 --k 5", "--k 5 belongs to --probe knn; give that too, or leave it out"),
    ("evaluate --runs taught 1 --probe linear --k 5", "--k 5 belongs to --probe knn; leave it out"),
    (
        "evaluate --runs taught 1 --probe knn --dataset digits",
        "taught/1/student.safetensors was trained on 1x8x8 images; digits has 1x16x16; choose a data set of that shape",
    ),
    (
        "evaluate --runs taught 1 --probe knn --dataset none",
        "--dataset none: it has no labels to measure anything by; name a labelled data set",
    ),
    ("evaluate --runs taught 1 --dataset none", "--dataset none: it has no labels to measure anything by; name a labelled data set"),
    # export
    ("export", "Missing argument 'RUN|FILE' (flowdistill --help)"),
    ("export --to onnx none.safetensors", "weights file none.safetensors: no such file"),
    ("export --runs taught 1", "Missing option '--to'. Choose from: safetensors, torch-export, onnx (flowdistill --help)"),
    ("export --runs taught 1 --to tflite", "unknown export format 'tflite': choose from: safetensors, torch-export, onnx"),
    ("export --runs taught --to onnx 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("export --runs taught --to onnx 2", "weights file taught/2/student.safetensors: no such file"),
    (
        "export --runs taught 1 --to safetensors --out junk.txt/it",
        "--out junk.txt/it: cannot be written there (junk.txt is a file); name another file",
    ),
    (
        "export --runs taught 1 --to onnx --dataset digits",
        "taught/1/student.safetensors was trained on 1x8x8 images of 10 classes; digits has 1x16x16 of 10; choose a data set of that shape",
    ),
    (
        "export --runs taught 1 --to torch-export --int8",
        "--int8 with --to torch-export: only ONNX files are quantised; use --to onnx, or leave --int8 out",
    ),
    ("export --runs taught 1 --to onnx --format txt", "--format='txt': not one of 'table', 'md', 'csv', 'json'"),
    (
        "export 1 --to onnx --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    (
        "evaluate 1 --runs junk.txt",
        "junk.txt/ledger.db cannot be used as a ledger (junk.txt is a file); name another folder with --runs",
    ),
    ("card", "Missing argument 'run' (flowdistill --help)"),
    ("card one", "run='one': input should be a valid integer, unable to parse string as an integer"),
    ("card --runs taught 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("card --runs taught 2", "run 2 is failed, not finished; choose a finished one (flowdistill runs --runs taught)"),
    ("card 1 --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    ("card --runs taught 1 --format pdf", "--format='pdf': not one of 'md', 'html'"),
    ("card --runs taught 1 --batch-size 0", "--batch-size='0': input should be greater than or equal to 1"),
    ("card --runs taught 1 --batch-size 5000", "--batch-size='5000': input should be less than or equal to 4096"),
    (
        "card --runs taught 1 --device cuda:99",
        "--device 'cuda:99' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("train --dataset digits --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("distill --dataset digits --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("doctor --dataset digits --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("evaluate 1 --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("export 1 --to onnx --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("card 1 --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("train --dataset digits --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("distill --dataset digits --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("doctor --dataset digits --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("evaluate 1 --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("export 1 --to onnx --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("card 1 --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("taps resnet8 --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("resume --ray head:99999", "--ray 'head:99999' is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local"),
    ("resume --storage shared", "--storage shared belongs to --ray; give --ray local, auto or HOST:PORT, or leave it out"),
    ("resume --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
    ("check one", "run='one': input should be a valid integer, unable to parse string as an integer"),
    ("check --runs taught 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    ("check --runs none", "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs"),
    ("check 1 --format yaml", "--format='yaml': not one of 'table', 'md', 'csv', 'json'"),
    ("card --runs taught 1 --out taught", "taught: the card cannot be written there (it is not a file); name another file with --out"),
    (
        "card --runs taught 1 --out junk.txt/card.md",
        "junk.txt/card.md: the card cannot be written there (junk.txt is a file); name another file with --out",
    ),
    # trackers
    ("train --dataset digits --log tensorbord", "--log 'tensorbord' is no tracker; choose from: csv, tensorboard, wandb"),
    ("distill --dataset digits --log csv,csv", "--log names csv twice; name each once"),
    ("resume --log csv,", "--log '' is no tracker; choose from: csv, tensorboard, wandb"),
    ("reproduce log --log mlflow", "--log 'mlflow' is no tracker; choose from: csv, tensorboard, wandb"),
    ("log --to csv", "Missing argument 'RUN...' (flowdistill --help)"),
    ("log one --to csv", "numbers='one': input should be a valid integer, unable to parse string as an integer"),
    ("log 1", "Missing option '--to' (flowdistill --help)"),
    ("log 1 --to xls", "--to 'xls' is no tracker; choose from: csv, tensorboard, wandb"),
    (
        "log 1 --to csv --runs none",
        "no ledger in none: train something first (flowdistill demo --runs none), or name its folder with --runs",
    ),
    ("log --runs taught --to csv 7", "no run 7 in taught/ledger.db: the last is 2; flowdistill runs --runs taught lists them"),
    (
        f"log 1 --to csv --runs taught --device {LACKING}",
        f"--device '{LACKING}' is not available here; use auto, or what this machine has of cpu, cuda, mps",
    ),
    ("log 1 --to csv --accept-changes=yes", "Option '--accept-changes' does not take a value (flowdistill --help)"),
    ("log 1 --to csv --trust-code=yes", "Option '--trust-code' does not take a value (flowdistill --help)"),
]


@pytest.fixture(scope="module")
def folder(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is nothing else, two small data sets, and a ledger of two runs: a finished teacher and one that diverged."""
    path = tmp_path_factory.mktemp("bad")
    (path / "junk.txt").write_text("junk")
    (path / "small.npz").write_bytes(small_npz.read_bytes())
    images = np.zeros((20, 8, 8), np.uint8)
    np.savez(path / "few.npz", x_train=images, y_train=np.arange(20) % 5, x_test=images, y_test=np.arange(20) % 5)
    np.savez(path / "more.npz", x=np.zeros((20, 8, 8, 3), np.uint8))
    for words in ("--model resnet14 --seeds 5", "--model resnet8 --lr 1e30"):
        command(path, *shlex.split(f"train {words} --dataset npz:small.npz --epochs 1 --batch-size 64 --set data.pad=1 --runs taught"))
    gc.collect()  # closes the ledger
    return path


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_command_is_told_in_one_line(folder: Path, words: str, line: str) -> None:
    assert_refused(folder, shlex.split(words), line)


def test_every_option_and_argument_of_every_command_was_got_wrong() -> None:
    """The mistake stands last in a wrong command."""
    wrong = set()
    for words, _ in WRONG:
        name, *given = shlex.split(words)
        option = next((word for word in reversed(given[-2:]) if word.startswith("--")), "argument")
        wrong.add((name, option.partition("=")[0]))
    group = typer.main.get_command(app)
    there = {
        (name, parameter.opts[0] if parameter.opts[0].startswith("--") else "argument")
        for name, found in group.commands.items()
        for inner in [found, *getattr(found, "commands", {}).values()]
        for parameter in inner.params
    }
    assert len(there) > 50
    assert there - wrong == set()


def test_a_line_stays_one_line_without_control_characters_and_not_long(folder: Path) -> None:
    hostile = "x\n\x1b[2J\u202e" + "y" * 100_000
    said = command(folder, "train", "--dataset", hostile)
    assert said.err.startswith(r"flowdistill: unknown data set 'x\n\x1b[2J\u202eyyy")
    assert said.err.endswith("': choose from: digits, cifar10, cifar100, fashion_mnist, npz:PATH, folder:PATH, csv:FILE, hf:NAME\n")
    assert len(said.err) < 700
