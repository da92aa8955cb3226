# A list of its plugins, which dot itself writes beside them.
for dir in $search; do
	[ ! -d "$dir/lib/$triplet/graphviz" ] || plugins=$dir/lib/$triplet/graphviz
done
mkdir -p "$out/lib/graphviz"
cp -P "$plugins"/*.so* "$out/lib/graphviz/"
GVBINDIR=$out/lib/graphviz "$out/bin/dot" -c
# Its name says what it does.
mv "$out/bin/dot" "$out/lib/graphviz/dot"
wrap "$out/bin/dot" "$out/lib/graphviz/dot" "GVBINDIR=$out/lib/graphviz"
