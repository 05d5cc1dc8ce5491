// The GPU probe's kernels as PTX text. ISA 7.0 and target sm_80: the driver translates it for every card from
// Ampere on, whatever the driver's age since CUDA 11.
#pragma once

#include <string>

namespace gpu_probe {

// Shape of the matrix kernel: a block of warps_m x warps_n warps, each a tile of 64 x 64 results; the
// operands of `row_bytes` of depth go through `stages` buffers in shared memory.
struct GemmShape {
  int warps_m, warps_n, stages, row_bytes;
  int rows() const { return 64 * warps_m; }
  int columns() const { return 64 * warps_n; }
  int threads() const { return 32 * warps_m * warps_n; }
  int stage_bytes() const { return (rows() + columns()) * row_bytes; }
  int shared_bytes() const { return stage_bytes() * stages; }
};

// Both fit into the 99 KiB of shared memory that every card since Ampere gives a block; the second leaves
// room for two blocks there. Which is faster depends on the card (on an H200 the first: 450 and 400 TFLOP/s
// in bf16).
constexpr GemmShape kGemmShapes[] = {{2, 2, 3, 128}, {2, 2, 3, 64}};

// fill(words*, count, step): words[i] = i * step.   empty(): nothing.
// read_sum(data*, rounds, sum*): adds all 32-bit words of rounds * 8 * threads * 16 bytes to *sum; 8 loads of
// 16 bytes a thread are in flight.
inline std::string basic_ptx() {
  std::string s = R"(.version 7.0
.target sm_80
.address_size 64
.visible .entry empty() { ret; }
.visible .entry fill(.param .u64 words, .param .u64 count, .param .u32 step) {
.reg .b32 %r<5>; .reg .b64 %d<5>; .reg .pred %p;
ld.param.u64 %d0, [words]; ld.param.u64 %d1, [count]; ld.param.u32 %r0, [step];
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %nctaid.x;
mad.wide.u32 %d2, %r2, %r3, 0; cvt.u64.u32 %d3, %r1; add.u64 %d2, %d2, %d3;
mul.wide.u32 %d3, %r3, %r4;
next: setp.ge.u64 %p, %d2, %d1; @%p bra done;
cvt.u32.u64 %r1, %d2; mul.lo.u32 %r1, %r1, %r0;
shl.b64 %d4, %d2, 2; add.u64 %d4, %d4, %d0; st.global.u32 [%d4], %r1;
add.u64 %d2, %d2, %d3; bra next;
done: ret; }
.visible .entry read_sum(.param .u64 data, .param .u32 rounds, .param .u64 sum) {
.reg .b32 %r<8>; .reg .b32 %v<32>; .reg .b64 %d<5>; .reg .pred %p;
ld.param.u64 %d0, [data]; ld.param.u32 %r0, [rounds]; ld.param.u64 %d4, [sum];
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %nctaid.x;
mad.lo.u32 %r5, %r2, %r3, %r1; mad.wide.u32 %d0, %r5, 16, %d0;
mul.lo.u32 %r6, %r3, %r4; mul.wide.u32 %d1, %r6, 16; mov.u32 %r7, 0;
next:
)";
  for (int i = 0; i < 8; ++i) {
    const std::string v = "%v" + std::to_string(4 * i);
    s += "ld.global.nc.v4.u32 {" + v;
    for (int j = 1; j < 4; ++j) s += ", %v" + std::to_string(4 * i + j);
    s += "}, [%d0]; add.u64 %d0, %d0, %d1;\n";
  }
  for (int i = 0; i < 32; ++i) s += "add.u32 %r7, %r7, %v" + std::to_string(i) + ";\n";
  s += "sub.u32 %r0, %r0, 1; setp.ne.u32 %p, %r0, 0; @%p bra next;\n";
  for (const char* lane : {"16", "8", "4", "2", "1"})
    s += std::string("shfl.sync.bfly.b32 %r6, %r7, ") + lane + ", 31, 0xffffffff; add.u32 %r7, %r7, %r6;\n";
  return s + R"(and.b32 %r6, %r1, 31; setp.ne.u32 %p, %r6, 0; @%p bra done;
red.global.add.u32 [%d4], %r7;
done: ret; }
)";
}

// gemm(a*, b*, c*, depth_bytes, columns): C = A * B^T, rows of A and B `depth_bytes` long, C of 4-byte
// numbers with `columns` a row; a block for each tile (grid x over columns, y over rows), no bounds checks.
// bf16 gives f32 (mma.m16n8k16), s8 gives s32 (mma.m16n8k32): both step 32 bytes of depth and have the same
// layout in bytes.
class GemmPtx {
 public:
  GemmPtx(bool int8, GemmShape shape) : int8_(int8), g_(shape) {}

  std::string text() {
    head();
    loads_set_up();
    fragments_set_up();
    for (int s = 0; s + 1 < g_.stages; ++s) load_stage();
    line("mov.u32 %step, 0;\nmain:");
    line("cp.async.wait_group " + n(g_.stages - 2) + "; bar.sync 0;");
    line("setp.lt.u32 %more, %loaded, %steps;");
    load_stage();
    for (int k = 0; k < g_.row_bytes / 32; ++k) multiply(k);
    line("add.u32 %read, %read, " + n(g_.stage_bytes()) + "; setp.eq.u32 %p, %read, " + n(g_.shared_bytes()) +
         ";");
    line("@%p mov.u32 %read, 0; add.u32 %step, %step, 1;");
    line("setp.lt.u32 %p, %step, %steps; @%p bra main;");
    store();
    return s_;
  }

 private:
  static std::string n(long long i) { return std::to_string(i); }
  void line(const std::string& text) { s_ += text + "\n"; }
  std::string sums(int m, int t) const {  // the four of result tile m, t
    std::string text;
    for (int i = 0; i < 4; ++i) text += (i ? ", %c" : "%c") + n((m * 8 + t) * 4 + i);
    return "{" + text + "}";
  }

  void head() {
    line(".version 7.0\n.target sm_80\n.address_size 64\n.extern .shared .align 128 .b8 tiles[];");
    line(
        ".visible .entry gemm(.param .u64 a, .param .u64 b, .param .u64 c, .param .u32 depth, .param .u32 "
        "columns)");
    line(".maxntid " + n(g_.threads()) + ", 1, 1\n{\n.reg .pred %p, %more;");
    line(
        ".reg .b32 %id, %lane, %warp, %wm, %wn, %steps, %step, %loaded, %write, %read, %row, %chunk, %t, %u, "
        "%to;");
    line(".reg .b64 %pa, %pb, %pc, %x, %rowstep, %depth;\n.reg .b32 %c<128>, %fa<16>, %fb<16>;");
    line(".reg .b32 %la, %lb, %aa, %bb;");
    line("mov.u32 %id, %tid.x; and.b32 %lane, %id, 31; shr.u32 %warp, %id, 5;");
    line("rem.u32 %wn, %warp, " + n(g_.warps_n) + "; div.u32 %wm, %warp, " + n(g_.warps_n) + ";");
    line("ld.param.u32 %t, [depth]; cvt.u64.u32 %depth, %t; div.u32 %steps, %t, " + n(g_.row_bytes) + ";");
    for (int i = 0; i < 128; ++i) line("mov.b32 %c" + n(i) + ", 0;");
  }

  // %to = swizzled place of 16-byte chunk %chunk of row %row: any 8 rows of one chunk lie in different banks.
  void swizzle() {
    if (g_.row_bytes == 64) line("shr.u32 %t, %row, 1; and.b32 %t, %t, 3;");
    if (g_.row_bytes == 128) line("and.b32 %t, %row, 7;");
    line("xor.b32 %t, %t, %chunk; shl.b32 %t, %t, 4; mad.lo.u32 %to, %row, " + n(g_.row_bytes) + ", %t;");
  }

  // Every thread copies one chunk of every `threads / chunks`-th row of both operands.
  void loads_set_up() {
    const int chunks = g_.row_bytes / 16;
    line("div.u32 %row, %id, " + n(chunks) + "; rem.u32 %chunk, %id, " + n(chunks) + ";");
    swizzle();
    line("mov.u32 %u, tiles; add.u32 %write, %to, %u; mov.u32 %loaded, 0; mov.u32 %read, 0;");
    for (const bool a : {true, false}) {
      const std::string p = a ? "%pa" : "%pb";
      line(std::string("ld.param.u64 ") + p +
           (a ? ", [a]; mov.u32 %t, %ctaid.y;" : ", [b]; mov.u32 %t, %ctaid.x;"));
      line("mad.lo.u32 %t, %t, " + n(a ? g_.rows() : g_.columns()) + ", %row; cvt.u64.u32 %x, %t;");
      line("mad.lo.u64 " + p + ", %x, %depth, " + p + "; mad.wide.u32 " + p + ", %chunk, 16, " + p + ";");
    }
    line("mul.lo.u64 %rowstep, %depth, " + n(g_.threads() / chunks) +
         "; setp.lt.u32 %more, %loaded, %steps;");
  }

  void load_stage() {
    const int rows = g_.threads() / (g_.row_bytes / 16);
    int place = 0;
    for (const bool a : {true, false}) {
      line(std::string("mov.u64 %x, ") + (a ? "%pa;" : "%pb;"));
      for (int r = 0; r < (a ? g_.rows() : g_.columns()); r += rows, place += rows * g_.row_bytes)
        line("@%more cp.async.cg.shared.global [%write+" + n(place) +
             "], [%x], 16; add.u64 %x, %x, %rowstep;");
    }
    line("cp.async.commit_group; add.u32 %loaded, %loaded, 1; setp.lt.u32 %more, %loaded, %steps;");
    line("add.u64 %pa, %pa, " + n(g_.row_bytes) + "; add.u64 %pb, %pb, " + n(g_.row_bytes) + ";");
    // The place wraps after the last buffer; %u still holds where the tiles begin.
    line("add.u32 %write, %write, " + n(g_.stage_bytes()) + "; sub.u32 %t, %write, %u;");
    line("setp.ge.u32 %p, %t, " + n(g_.shared_bytes()) + "; @%p sub.u32 %write, %write, " +
         n(g_.shared_bytes()) + ";");
  }

  // Where this lane's row of an ldmatrix lies in the first buffer: A as 16 rows x 2 chunks, B as 2 x 8 rows
  // x 2.
  void fragments_set_up() {
    line("and.b32 %row, %lane, 15; mad.lo.u32 %row, %wm, 64, %row; shr.u32 %chunk, %lane, 4;");
    swizzle();
    line("add.u32 %la, %to, %u;");
    line("and.b32 %row, %lane, 7; shr.u32 %t, %lane, 4; mad.lo.u32 %row, %t, 8, %row;");
    line("mad.lo.u32 %row, %wn, 64, %row; shr.u32 %chunk, %lane, 3; and.b32 %chunk, %chunk, 1;");
    swizzle();
    line("add.u32 %lb, %to, %u; add.u32 %lb, %lb, " + n(g_.rows() * g_.row_bytes) + ";");
  }

  void load_fragments(const std::string& to, const std::string& from) {
    for (int i = 0; i < 4; ++i) {
      std::string four;
      for (int j = 0; j < 4; ++j) four += (j ? ", " : "") + to + n(4 * i + j);
      line("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {" + four + "}, [" + from + "+" +
           n(i * 16 * g_.row_bytes) + "];");
    }
  }

  void multiply(int k) {
    line("xor.b32 %aa, %la, " + n(32 * k) + "; add.u32 %aa, %aa, %read;");
    line("xor.b32 %bb, %lb, " + n(32 * k) + "; add.u32 %bb, %bb, %read;");
    load_fragments("%fa", "%aa");
    load_fragments("%fb", "%bb");
    const std::string op = int8_ ? "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                                 : "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ";
    for (int m = 0; m < 4; ++m) {
      const std::string a =
          "{%fa" + n(4 * m) + ", %fa" + n(4 * m + 1) + ", %fa" + n(4 * m + 2) + ", %fa" + n(4 * m + 3) + "}";
      for (int t = 0; t < 8; ++t)
        line(op + sums(m, t) + ", " + a + ", {%fb" + n(2 * t) + ", %fb" + n(2 * t + 1) + "}, " + sums(m, t) +
             ";");
    }
  }

  void store() {
    line("ld.param.u64 %pc, [c]; ld.param.u32 %u, [columns]; mov.u32 %t, %ctaid.y;");
    line("mad.lo.u32 %row, %t, " + n(g_.rows()) +
         ", 0; mad.lo.u32 %row, %wm, 64, %row; shr.u32 %t, %lane, 2;");
    line("add.u32 %row, %row, %t; mov.u32 %t, %ctaid.x; mad.lo.u32 %to, %t, " + n(g_.columns()) + ", 0;");
    line("mad.lo.u32 %to, %wn, 64, %to; and.b32 %t, %lane, 3; mad.lo.u32 %to, %t, 2, %to;");
    line("cvt.u64.u32 %x, %to; mad.wide.u32 %x, %row, %u, %x; shl.b64 %x, %x, 2; add.u64 %pc, %pc, %x;");
    line("mul.wide.u32 %x, %u, 32;");  // eight rows further
    for (int half = 0; half < 8; ++half) {
      for (int t = 0; t < 8; ++t) {
        const int c = (half / 2 * 8 + t) * 4 + half % 2 * 2;
        line("st.global.v2.b32 [%pc+" + n(32 * t) + "], {%c" + n(c) + ", %c" + n(c + 1) + "};");
      }
      line("add.u64 %pc, %pc, %x;");
    }
    line("ret;\n}");
  }

  bool int8_;
  GemmShape g_;
  std::string s_;
};

}  // namespace gpu_probe
