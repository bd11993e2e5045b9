# Run in a folder that has networks.py and prepare.py; RUNS is the folder of the ledger.
python prepare.py images
ADAMW="--lr 0.001 --set train.optimizer=adamw --set train.weight_decay=0.05 --set train.decay_norm_and_bias=false --set train.schedule=cosine --set train.clip=1"
FEW="--dataset npz:few.npz --set data.pad=2 --set data.flip=false --batch-size 20 --precision fp32 --seeds 0-2"
CNN="--student resnet8 $FEW --lr 0.05 --set train.schedule=cosine --epochs 30"
VIT="--student networks.py:vit $FEW $ADAMW --epochs 60"
WEIGHTS="--set weights.at=20"

# The teachers: all 898 training digits.
flowdistill train --model resnet20 --dataset digits --batch-size 32 --precision fp32 --seeds 100 --lr 0.05 --set train.schedule=cosine --epochs 10 --runs $RUNS
flowdistill train --model networks.py:vit --dataset digits --batch-size 32 --precision fp32 --seeds 100 $ADAMW --epochs 30 --runs $RUNS
python prepare.py backbones $RUNS

# A convolutional student of 100 labelled digits.
flowdistill distill --method base,kd,fsp --teacher 1 $CNN --runs $RUNS
flowdistill distill --method at,radio,seed_kd $WEIGHTS --teacher networks.py:trained_backbone@resnet20.pt $CNN --runs $RUNS
flowdistill distill --method kd --probe --teacher networks.py:trained_backbone@resnet20.pt $CNN --runs $RUNS
flowdistill distill --method at,radio $WEIGHTS --teacher networks.py:vit_backbone@vit.pt $CNN --runs $RUNS
flowdistill distill --method at,radio $WEIGHTS --teacher networks.py:random_backbone@random.pt $CNN --runs $RUNS

# A vision transformer as the student.
flowdistill distill --method base,kd,at $WEIGHTS --teacher 1 $VIT --runs $RUNS
flowdistill distill --method at,radio $WEIGHTS --teacher networks.py:trained_backbone@resnet20.pt $VIT --runs $RUNS
flowdistill distill --method at,radio $WEIGHTS --teacher networks.py:random_backbone@random.pt $VIT --runs $RUNS
