#!/bin/sh
# Make docs/terminal.txt: what train.py shows on terminals of three widths, and in a pipe.
# Needs tmux, and the environment's python first on PATH. Takes about eight minutes.
#
#     sh docs/terminal.sh > docs/terminal.txt
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
short="--time-limit 25s --n-layer 2 --d-model 64 --seq-len 64 --vocab-size 1024"
short="$short --log-every 50 --eval-every 100 --eval-batches 5 --final-eval-batches 20"
short="$short --sample-prompt def"

heading() { # the command, and where and when it ran
    printf '==== %s | %s | %s | commit %s\n' "$1" "$2" "$(date -u +%Y-%m-%d)" "$(git rev-parse --short HEAD)"
}

capture() { # columns, seconds after which it is looked at while running, flags
    name="terminal-$$-$1"
    tmux new-session -d -s "$name" -x "$1" -y 50 \
        "python train.py $3 --out $work/$1; touch $work/$1.done; sleep 60"
    sleep "$2"
    heading "python train.py $3" "$1 columns, while it runs"
    tmux capture-pane -p -t "$name" -S - | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'
    while [ ! -e "$work/$1.done" ]; do
        if tmux capture-pane -p -t "$name" | grep -q '^evaluating |' && [ ! -e "$work/$1.seen" ]; then
            touch "$work/$1.seen"
            heading "the same" "$1 columns, last line while it evaluates"
            tmux capture-pane -p -t "$name" | grep '^evaluating |'
        fi
        sleep 0.2
    done
    sleep 1
    heading "the same" "$1 columns, at the end"
    tmux capture-pane -p -t "$name" -S - | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'
    tmux kill-session -t "$name"
}

capture 80 90 ""
capture 120 90 ""
capture 40 25 "$short"
heading "python train.py $short 2>&1 | cat" "a pipe"
python train.py $short --out "$work/pipe" 2>&1 | cat
rm -r "$work"
