# Formats are modules, and what it may do is in files.
settings=
for dir in $search; do
	for modules in "$dir/lib/$triplet"/ImageMagick-*/modules-Q16/coders; do
		coders=$modules
	done
	for place in "$dir"/etc/ImageMagick-* "$dir/lib/$triplet"/ImageMagick-*/config-Q16 "$dir"/share/ImageMagick-*; do
		settings=$settings${settings:+:}$place
	done
done
for program in "$out"/bin/*-im6.q16; do
	name=${program##*/}
	mv "$program" "$out/bin/.$name"
	wrap "$program" "$out/bin/.$name" "MAGICK_CODER_MODULE_PATH=$coders" "MAGICK_CODER_FILTER_PATH=${coders%coders}filters" "MAGICK_CONFIGURE_PATH=$settings"
done
