package worker

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
)

// FuzzFields reads anything as any field: it must end in an error or in a
// value that is written back and read as the same bytes again.
func FuzzFields(f *testing.F) {
	const letters = "pPosSnbDmMOVI?QRrxBKG"
	f.Add(uint8(0), []byte(s(vDir+"/"+vPath)))
	f.Add(uint8(11), []byte(w(0)+w(0)+s("x")+s("b")+w(1)+s("a")+w(0)))
	f.Add(uint8(12), []byte(s(vDir+"/"+vPath)+vInfoBytes))
	f.Add(uint8(15), []byte(s(vRealisation)))
	f.Add(uint8(18), []byte(w(12)+s("x")+w(2)+w(1)+w(3)+w(4)+w(0)+w(0)+w(1)+s("sha256:"+vHash+"!out")+s(vRealisation)))
	f.Add(uint8(7), []byte(w(1)+s(vDir+"/"+vDrv+"!b,a")))
	f.Fuzz(func(t *testing.T, kind uint8, data []byte) {
		letter := rune(letters[int(kind)%len(letters)])
		first := newHalf(bytes.NewReader(data), io.Discard, vDir, MaxVersion)
		first.field(letter)
		if first.d.err != nil {
			return
		}
		if err := first.want.flush(); err != nil {
			t.Fatal(err)
		}
		again := newHalf(bytes.NewReader(first.got.Bytes()), io.Discard, vDir, MaxVersion)
		again.field(letter)
		if err := again.check("written and read again"); err != nil {
			t.Errorf("letter %c: %v", letter, err)
		}
	})
}

// FuzzServe lets a client say anything behind the greeting: the server must
// neither panic nor hang.
func FuzzServe(f *testing.F) {
	f.Add([]byte(w(1) + s(vDir+"/"+vPath)))
	f.Add([]byte(w(7) + s("n") + s("text:sha256") + w(0) + w(0) + frame("data")))
	f.Add([]byte(w(44) + w(0) + w(1) + frame(w(1)+s(vDir+"/"+vPath)+vInfoBytes+narOf("x"))))
	f.Add([]byte(w(39) + s(vDir+"/"+vPath) + vInfoBytes + w(0) + w(1) + frame(narOf("x"))))
	f.Add([]byte(w(46) + w(1) + s(vDir+"/"+vDrv+"!*") + w(0)))
	f.Add([]byte(w(20) + w(2) + w(0) + w(0) + w(0) + w(0) + w(0) + w(0)))
	f.Add([]byte(w(99)))
	f.Fuzz(func(t *testing.T, data []byte) {
		root := t.TempDir()
		dir := flox.StoreDir(filepath.Join(root, "store"))
		st := newDirStore(t, dir, root)
		data = bytes.ReplaceAll(data, []byte(s(vDir+"/"+vPath)), []byte(s(dir.Join(vPath))))
		conn := &monologue{Reader: io.MultiReader(bytes.NewReader([]byte(w(clientMagic)+w(uint64(v34))+w(0)+w(0))), bytes.NewReader(data))}
		server := &Server{Dir: dir, Open: st.open}
		_ = server.Serve(context.Background(), conn, Peer{Trust: NotTrusted})
	})
}

// monologue is a client that does not listen.
type monologue struct{ io.Reader }

func (*monologue) Write(p []byte) (int, error) { return len(p), nil }
func (*monologue) Close() error                { return nil }
