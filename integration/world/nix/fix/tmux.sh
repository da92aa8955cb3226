mv "$out/bin/tmux" "$out/bin/.tmux"
wrap "$out/bin/tmux" "$out/bin/.tmux" "LOCPATH=$(find_in lib/locale)"
