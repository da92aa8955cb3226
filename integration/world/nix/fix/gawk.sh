ln -sfn gawk "$out/bin/awk"
