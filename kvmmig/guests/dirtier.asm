# dirtier: fills its memory, rewrites a hot set for ever, and checks every page as it goes
#@ entry long64
#@ param hot = 64MiB    bytes that are rewritten over and over, shared by all vCPUs
#@ param stride = 1     every how-many-th page is hot, until the hot set is used up
#@ param pace = 0       pages that each vCPU rewrites a second; 0 is flat out
#@ check dirtier
#
# The pages from 2 MiB up are dealt out to the vCPUs in contiguous shares. Page k * STRIDE of a share is hot,
# for k below the share's number of hot pages; all others are cold. Each vCPU
#
#   1. fills its share: every page gets generation 0;
#   2. for ever, a lap: verifies each hot page against generation `lap`, writes generation `lap + 1` over it,
#      and then verifies the next sixteenth of its cold pages. After sixteen laps, a pass, all of its pages
#      have been verified, and it prints a letter: vCPU 0 A..Z, vCPU 1 a..z, the others 0..9.
#
# Word j of page p (its guest-physical address / 4096) at generation g is
#
#   z ^ (z >> 32)   where z = p * C1 + g * C2 + C3 + j * STEP   (64-bit)
#
# A wrong word is printed in a line that starts with FAIL, and ends the guest with status 1. The host checks
# the same things on a stopped guest in dirtier.py, which has these constants too.
#
# Predefined: MEMORY (bytes of RAM), CPUS, and each parameter in upper case.

C1   = 0x9e3779b97f4a7c15
C2   = 0xc2b2ae3d27d4eb4f
C3   = 0x27220a95fe47c21b
STEP = 0xd6e8feb86659fd93

SERIAL   = 0x3f8
EXIT     = 0xf4
STATUS   = 0x101000             # one block of 64 bytes a vCPU; the lock lies beyond them
BOUNDARY = 0x200000             # below it: tables, stacks, this image
HOLE     = 0xc0000000           # RAM that does not fit below 3 GiB goes on at 4 GiB
HOLE_SIZE = 0x40000000
OWNED     = (MEMORY - BOUNDARY) / 4096
HOT_PAGES = HOT / 4096
MAGIC     = 0x7265697472696421

# A status block: 64-bit words at these offsets. Each is stored after the work that it tells of.
S_MAGIC    = 0
S_PAGES    = 8                  # pages in the share
S_FILLED   = 16                 # pages filled; the one of that index may be half filled
S_PROGRESS = 24                 # hot pages written, ever: lap * hot pages + k; hot page k may be half written
S_LAPS     = 32                 # laps finished, their share of the cold pages included
S_FAILURES = 40

# Registers that keep their meaning all along:
#   r15 status block   r14 first page of the share   r13 pages in it   r12 its hot pages   rbp lap
#   r8, r9, r10 the pace: cycles a page, when the next page is due, how late is too late
#   xmm2 STEP * 2, twice
# The subroutines use rax, rcx, rdx, xmm0, xmm1, xmm3 freely.

start:
    mov r15, rdi
    shl r15, 6
    add r15, STATUS
    mov r11, rcx                        # TSC kHz

    mov rbx, OWNED
    call part
    mov r14, rax
    inc rdi
    call part
    mov r13, rax
    sub r13, r14
    mov rbx, HOT_PAGES
    call part
    mov r12, rax
    dec rdi
    call part
    sub r12, rax

    mov rax, r11
    imul rax, rax, 100
    mov r10, rax                        # 100 ms late: no use in catching up
.if PACE > 0
    imul rax, rax, 10
    xor edx, edx
    movabs rcx, PACE
    div rcx
    mov r8, rax
    mov r9, 0                           # long ago, so wait_for_slot begins with now
.endif

    movabs rax, STEP * 2
    movq xmm2, rax
    punpcklqdq xmm2, xmm2

    mov qword ptr [r15 + S_PAGES], r13
    movabs rax, MAGIC
    mov qword ptr [r15 + S_MAGIC], rax

    xor esi, esi                        # generation
    xor r11d, r11d                      # page of the share
fill:
    cmp r11, r13
    jae filled
    mov rax, r11
    call page_address
    call write_page
    inc r11
    mov qword ptr [r15 + S_FILLED], r11
    jmp fill
filled:
    xor ebp, ebp

lap:
    xor r11d, r11d                      # hot page
hot:
    cmp r11, r12
    jae hot_done
.if PACE > 0
    call wait_for_slot
.endif
    movabs rax, STRIDE
    imul rax, r11
    call page_address
    mov rsi, rbp
    call verify_page
    inc rsi
    call write_page
    inc qword ptr [r15 + S_PROGRESS]
    inc r11
    jmp hot
hot_done:

    mov rax, rbp                        # cold pages from r11 up to rbx, a sixteenth of the share
    and eax, 15
    mov rbx, r13
    imul rbx, rax
    mov r11, rbx
    add rbx, r13
    shr r11, 4
    shr rbx, 4
    xor esi, esi
cold:
    cmp r11, rbx
    jae cold_done
    mov rax, r11
    xor edx, edx
    movabs rcx, STRIDE
    div rcx
    test rdx, rdx
    jnz is_cold
    cmp rax, r12
    jb cold_next                        # hot: seen in the lap
is_cold:
    mov rax, r11
    call page_address
    call verify_page
cold_next:
    inc r11
    jmp cold
cold_done:

    inc rbp
    mov qword ptr [r15 + S_LAPS], rbp
    test ebp, 15
    jnz lap
    call print_letter
    jmp lap


# rax = rbx * rdi / CPUS: where the share of vCPU rdi begins when rbx pages are dealt out
part:
    mov rax, rbx
    mul rdi
    mov rcx, CPUS
    div rcx
    ret

# rdi = address of page rax of the share
page_address:
    lea rdi, [rax + r14]
    shl rdi, 12
    add rdi, BOUNDARY
    movabs rax, HOLE
    cmp rdi, rax
    jb below_hole
    add rdi, HOLE_SIZE
below_hole:
    ret

# rax = z of the first word of the page at rdi, generation rsi; rcx = STEP
first_z:
    mov rax, rdi
    shr rax, 12
    movabs rcx, C1
    imul rax, rcx
    movabs rcx, C2
    imul rcx, rsi
    add rax, rcx
    movabs rcx, C3
    add rax, rcx
    movabs rcx, STEP
    ret

# xmm0 = z of the first two words
first_pair:
    call first_z
    movq xmm0, rax
    add rax, rcx
    movq xmm1, rax
    punpcklqdq xmm0, xmm1
    ret

# xmm1 = the two words that belong to xmm0
.macro WORDS
    movdqa xmm1, xmm0
    psrlq xmm1, 32
    pxor xmm1, xmm0
    paddq xmm0, xmm2
.endm

.macro WRITE offset
    WORDS
    movdqa xmmword ptr [rdi + rcx + \offset], xmm1
.endm

.macro VERIFY offset
    WORDS
    pcmpeqd xmm1, xmmword ptr [rdi + rcx + \offset]
    pand xmm3, xmm1
.endm

# Give the page at rdi generation rsi.
write_page:
    call first_pair
    xor ecx, ecx
write_more:
    WRITE 0
    WRITE 16
    WRITE 32
    WRITE 48
    add ecx, 64
    cmp ecx, 4096
    jb write_more
    ret

# Return if all of the page at rdi is of generation rsi, and fail otherwise.
verify_page:
    call first_pair
    xor ecx, ecx
    pcmpeqd xmm3, xmm3                  # all ones as long as every word was right
verify_more:
    VERIFY 0
    VERIFY 16
    VERIFY 32
    VERIFY 48
    add ecx, 64
    cmp ecx, 4096
    jb verify_more
    pmovmskb eax, xmm3
    cmp eax, 0xffff
    jne find_wrong_word
    ret

.if PACE > 0
# Spin until the next page is due. The clock may jump when the guest is moved: the wait is never longer than
# one page's time from now, and a guest that is far too late does not run to catch up.
wait_for_slot:
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rcx, r9
    sub rcx, rax
    jle is_due
    cmp rcx, r8
    jbe wait_longer
    lea r9, [rax + r8]
wait_longer:
    pause
    jmp wait_for_slot
is_due:
    neg rcx
    cmp rcx, r10
    jbe in_time
    mov r9, rax
in_time:
    add r9, r8
    ret
.endif


# The page at rdi is not of generation rsi: say so, and end.
find_wrong_word:
    inc qword ptr [r15 + S_FAILURES]
    call first_z
    xor ebx, ebx                        # word
next_word:
    mov r12, rax
    shr r12, 32
    xor r12, rax                        # expected
    mov r13, qword ptr [rdi + rbx * 8]  # found
    cmp r12, r13
    jne say_it
    add rax, rcx
    inc ebx
    cmp ebx, 512
    jb next_word
    dec ebx                             # all is right again? say so by printing the last word
say_it:
    call lock_serial                    # for good: nobody prints after this line
    lea rsi, [rip + text_fail]
    call print_text
    mov rax, r15
    sub rax, STATUS
    shr rax, 6
    call print_decimal
    lea rsi, [rip + text_page]
    call print_text
    mov r8, rdi
    shr r8, 12
    call print_hex
    lea rsi, [rip + text_word]
    call print_text
    mov rax, rbx
    call print_decimal
    lea rsi, [rip + text_expected]
    call print_text
    mov r8, r12
    call print_hex
    lea rsi, [rip + text_found]
    call print_text
    mov r8, r13
    call print_hex
    mov cl, 10
    call print_char
    mov al, 1
    out EXIT, al
ended:
    pause
    jmp ended

# The letter of pass rbp / 16
print_letter:
    mov rax, rbp
    shr rax, 4
    dec rax
    mov ebx, 26
    mov ecx, 'A'
    mov rsi, r15
    sub rsi, STATUS
    jz letter_known
    mov ecx, 'a'
    cmp rsi, 64
    je letter_known
    mov ebx, 10
    mov ecx, '0'
letter_known:
    xor edx, edx
    div rbx
    add ecx, edx
    call lock_serial
    call print_char
    mov dword ptr [rip + serial_lock], 0
    ret

lock_serial:
    mov eax, 1
    xchg dword ptr [rip + serial_lock], eax
    test eax, eax
    jz locked
    pause
    jmp lock_serial
locked:
    ret

# Print the character in cl.
print_char:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       # THRE: the transmit register takes another byte
    jz print_char
    mov dx, SERIAL
    mov al, cl
    out dx, al
    ret

# Print the text at rsi.
print_text:
    mov cl, byte ptr [rsi]
    test cl, cl
    jz text_done
    call print_char
    inc rsi
    jmp print_text
text_done:
    ret

# Print eax, which is less than 1000.
print_decimal:
    xor r9d, r9d                        # digits so far
more_digits:
    xor edx, edx
    mov ecx, 10
    div ecx
    push rdx
    inc r9d
    test eax, eax
    jnz more_digits
print_digits:
    pop rcx
    add ecx, '0'
    call print_char
    dec r9d
    jnz print_digits
    ret

# Print r8 as 0x and its hexadecimal digits.
print_hex:
    mov cl, '0'
    call print_char
    mov cl, 'x'
    call print_char
    mov r9d, 16
skip_zeros:                             # at most fifteen of them
    mov rax, r8
    shr rax, 60
    jnz next_nibble
    shl r8, 4
    dec r9d
    cmp r9d, 1
    ja skip_zeros
next_nibble:
    mov rcx, r8
    shr rcx, 60
    shl r8, 4
    add ecx, '0'
    cmp ecx, '9'
    jbe nibble_known
    add ecx, 'a' - '0' - 10
nibble_known:
    call print_char
    dec r9d
    jnz next_nibble
    ret

text_fail:     .asciz "\nFAIL dirtier: vcpu "
text_page:     .asciz " page "
text_word:     .asciz " word "
text_expected: .asciz ": expected "
text_found:    .asciz ", found "

.balign 4096                            # STATUS: code is never on a page that is written
    .skip 16 * 64
serial_lock:
    .long 0
