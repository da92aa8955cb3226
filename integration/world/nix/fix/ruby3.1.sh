libraries=
for dir in $search; do
	for place in "$dir/lib/ruby/vendor_ruby" "$dir/lib/ruby/3.1.0" "$dir/lib/$triplet/ruby/3.1.0"; do
		[ ! -d "$place" ] || libraries=$libraries${libraries:+:}$place
	done
done
mv "$out/bin/ruby3.1" "$out/bin/.ruby3.1"
wrap "$out/bin/ruby3.1" "$out/bin/.ruby3.1" "RUBYLIB=$libraries"
