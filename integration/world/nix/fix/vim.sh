ln -s vim.basic "$out/bin/.vim"
for dir in $search; do
	for defaults in "$dir"/share/vim/vim[0-9]*/defaults.vim; do
		runtime=${defaults%/*}
	done
done
wrap "$out/bin/vim" "$out/bin/.vim" "VIM=${runtime%/*}" "VIMRUNTIME=$runtime"
