# Commands of stock Nix, whose answers from two daemons are compared. It is given: $GEN,
# which keeps the runs apart; $DIR, of its own and empty; $EXPR; $WEB, a binary cache that
# takes uploads. On PATH is an ssh whose hosts are "daemon", the daemon here, and "other",
# the store in $DIR/other. Without $SOAK only the steps are done that take no second or
# so: those that read, and the ways in and out that differ most.
export LC_ALL=C
cd "$DIR"

# step NAME COMMAND runs a command: what it prints, its exit code, and what it says
# besides, sorted.
step() {
	echo "=== $1"
	sh -c "$2" >out 2>err
	echo "--- $?" >code
	cat out code
	sort -u err
}
# prints is step without what is said besides, where that is of the daemon's own.
prints() { step "$1" "{ $2; } 2>/dev/null"; }
# more is a step of soaks.
more() { [ -z "$SOAK" ] || step "$@"; }
build="nix-build --no-out-link $EXPR --argstr gen $GEN"
attr="-f $EXPR --argstr gen $GEN"

step ping 'nix store ping'
# A daemon of 1.38 tells an older client that they differ, whosever it is.
[ "$GEN" = old ] || more doctor 'nix doctor'

mkdir tree && echo "1 $GEN" >tree/a && ln -s a tree/b && cp tree/a flat
step add 'nix-store --add tree'
more 'add fixed' 'for algo in md5 sha1 sha256 sha512; do nix-store --add-fixed $algo flat; done; nix-store --add-fixed --recursive sha1 tree'
more 'nix store add' 'nix store add-path --name named tree; nix store add-file flat'

step 'dry run' "$build --dry-run -A user"
step build "$build -A multi.out -A multi.dev -A multi.man -A user"
{ read -r out && read -r dev && read -r man && read -r user; } <out
drv=$(nix-instantiate "$EXPR" --argstr gen "$GEN" -A multi 2>/dev/null)
drv=${drv%%!*}
step read "cat $out $dev $man $user"
more 'nix build' "nix build --no-link --json $attr user"
more 'build more' "$build -A structured -A md5 -A sha1 -A sha256 -A sha512"
for a in wrong needsFails fails; do more "build $a" "$build -A $a"; done
more 'keep going' "$build --keep-going -A needsFails -A structured"
more 'import from derivation' "nix eval --raw $attr imported.said"
[ -z "$SOAK" ] || prints content "$build -A content -A contentUser -A contentMixed"
contents=$(cat out)
more 'read content' "for p in $(echo $contents); do cat \$p; done"
more realisation "nix realisation info --json $attr contentUser"
more check "$build --check -A multi.out"
[ -z "$SOAK" ] || $build -A restless >/dev/null 2>&1
more 'check restless' "$build --check -A restless"

for q in referrers tree ${SOAK:+hash deriver requisites}; do step "query $q" "nix-store -q --$q $man $dev"; done
step 'query outputs' "nix-store -q --outputs $drv; nix-store -qR --include-outputs $drv | sort"
more 'path-info' "nix path-info -rsSh $user | sort"
step 'path-info json' "nix path-info --json -r $user"
# With content-addressed derivations an old client asks for realisations of all outputs.
more 'path-info of a derivation' "export NIX_CONFIG='extra-experimental-features = nix-command'; nix path-info -S $drv 2>err1 || nix path-info -S $drv^out 2>err2 || cat err1 err2 >&2"
step 'path-info of nothing' 'nix path-info /nix/store/00000000000000000000000000000000-none'
step 'why-depends' "nix why-depends $user $out"
step 'why-depends not' "nix why-depends $out $user"
step 'nix log' "nix log $out"
step 'read-log' "nix-store --read-log $drv"
more 'nix show' "nix show-derivation $drv"
step 'store ls' "nix store ls -lR $out"
more 'dump' "nix-store --dump $man | sha256sum"

nix-store --generate-binary-cache-key test-1 key key.pub
# The key is another each time: who signed is what counts.
step sign "nix store sign -k key $out && nix path-info --sigs $out | grep -o test-1"
step 'verify signature' "nix store verify --trusted-public-keys \$(cat key.pub) $out"

step 'copy to file' "nix copy --to file://$DIR/cache $user && ls cache | sort && grep -h ^References cache/*.narinfo | sort"
more 'copy content to file' "nix copy --to file://$DIR/contents $attr contentUser && ls contents contents/realisations | sort"
# What was realised elsewhere comes in, is not built again, and goes out.
elsewhere="-f $EXPR --argstr gen else-$GEN"
[ -z "$SOAK" ] || nix build --store "$DIR/builder" --option sandbox-paths "/bin /usr /lib /lib64" --no-link $elsewhere contentUser >/dev/null 2>&1
more 'content comes in' "nix copy --store $DIR/builder --to file://$DIR/realised $elsewhere contentUser && nix copy --from file://$DIR/realised --to daemon $elsewhere contentUser"
more 'content is there' "nix build --no-link --json $elsewhere contentUser && nix realisation info --json $elsewhere contentUser"
more 'content goes out' "nix copy --to file://$DIR/back $elsewhere contentUser && ls back/realisations | sort"
more 'copy to http' "nix copy --to $WEB $user && nix path-info --store $WEB -r $user | sort"
more 'copy to ssh' "nix copy --no-check-sigs --to ssh-ng://other $user && nix path-info --store $DIR/other -rs $user | sort"
more 'copy from ssh' "nix copy --no-check-sigs --from ssh-ng://daemon --to $DIR/third $user && nix-store --store $DIR/third --verify --check-contents && nix path-info --store $DIR/third -r $user | sort"
more export "nix-store --export \$(nix-store -qR $user) | sha256sum"

# What comes in was made elsewhere, with a reference.
foreign() { nix-instantiate --store "$DIR/other" --eval --strict -E "builtins.toFile \"top-$1-$GEN\" \"see \${builtins.toFile \"dep-$1-$GEN\" \"$1\"}\"" 2>err | tr -d '"'; }
for way in file import ${SOAK:+http ssh to}; do
	p=$(foreign $way)
	case $way in
	file) how="nix copy --store $DIR/other --to file://$DIR/in $p && nix copy --no-check-sigs --from file://$DIR/in $p" ;;
	http) how="nix copy --store $DIR/other --to $WEB $p && nix copy --no-check-sigs --from $WEB $p" ;;
	ssh) how="nix copy --no-check-sigs --from ssh-ng://other $p" ;;
	to) how="nix copy --no-check-sigs --from $DIR/other --to ssh-ng://daemon $p" ;;
	import) how="nix-store --store $DIR/other --export \$(nix-store --store $DIR/other -qR $p) >in.export && nix-store --import <in.export" ;;
	esac
	step "comes in by $way" "$how && cat $p && nix-store -q --references $p"
done

more 'dump-db' "nix-store --dump-db $user $man $drv"
more verify 'nix-store --verify'
step 'verify content' "nix store verify --no-trust -r $user"
prints root "nix-store -r $user --add-root $DIR/root --indirect && nix-store --gc --print-roots | grep $DIR"
step 'alive' "nix-store --delete $out"
prints collect "nix-collect-garbage | sed 's/^.*store paths deleted.*/collected/' && cat $user"
prints 'collect the rest' "rm -f root && nix-store --gc --print-roots | grep $DIR"
