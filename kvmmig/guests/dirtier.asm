; dirtier: fills its memory, rewrites a hot set for ever, and checks every page as it goes
;@ entry long64
;@ param hot = 64MiB|25%     bytes that are rewritten over and over, shared by all vCPUs
;@ param stride = 1          every how-many-th page is hot, until the hot set is used up
;@ param pace = 0            pages that each vCPU rewrites a second; 0 is flat out
;@ param pattern = sweep|random|zipf    one after the other; each once a lap, shuffled; some far more often
;@ check dirtier
;
; The pages from 2 MiB up are dealt out to the vCPUs in contiguous shares. Page k * stride of a share is hot,
; for k below the share's number of hot pages; all others are cold. Each vCPU
;
;   1. fills its share: every page gets generation 0;
;   2. for ever, a step: verifies a hot page against its generation, and writes the next generation over it.
;      Steps make laps. In each a sixteenth of the cold pages is verified, evenly spread over its steps. After
;      sixteen laps, a pass, it prints a letter: vCPU 0 A..Z, vCPU 1 a..z, the others 0..9.
;
; The step's number, from 0 on, says which hot page it is the turn of:
;
;   sweep    page step % pages. A lap is a step for each page.
;   random   A lap is 2^m steps, as many as there are pages or more. Step i of lap n is the turn of page
;            shuffle(n, i), of nobody where there is no such page. shuffle(n, .) is a permutation.
;   zipf     Pages 2^c - 1 to 2^(c+1) - 2 are class c. The classes take turns, and so do the pages of a class.
;            So page k is rewritten about 1 / (k + 1) times as often as page 0. A lap is as long as for sweep.
;
; Word j of page p (its guest-physical address / 4096) at generation g is
;
;   z ^ (z >> 32)   where z = p * C1 + g * C2 + C3 + j * STEP   (64-bit)
;
; A wrong word is printed in a line that starts with FAIL, and ends the guest with status 1. The host checks
; the same things on a stopped guest in dirtier.py and patterns.py, which have these constants too.

    bits 64
    org 0x100000

C1        equ 0x9e3779b97f4a7c15
C2        equ 0xc2b2ae3d27d4eb4f
C3        equ 0x27220a95fe47c21b
STEP      equ 0xd6e8feb86659fd93

SERIAL    equ 0x3f8
EXIT      equ 0xf4
STATUS    equ 0x101000          ; one block of 64 bytes a vCPU; the lock lies beyond them
BOUNDARY  equ 0x200000          ; below it: tables, stacks, this image
HOLE      equ 0xc0000000        ; RAM that does not fit below 3 GiB goes on at 4 GiB
HOLE_SIZE equ 0x40000000
MAGIC     equ 0x7265697472696421

; The parameters, in the order of the declarations above
HOT       equ 0x9f000
STRIDE    equ HOT + 8
PACE      equ HOT + 16
PATTERN   equ HOT + 24          ; 0 sweep, 1 random, 2 zipf

; A status block: 64-bit words at these offsets. Each is stored after the work that it tells of.
S_MAGIC    equ 0
S_PAGES    equ 8                ; pages in the share
S_FILLED   equ 16               ; pages filled; the one of that index may be half filled
S_PROGRESS equ 24               ; steps done, ever; the page whose turn is next may be half written
S_LAPS     equ 32               ; laps finished, their share of the cold pages included
S_FAILURES equ 40

; Registers that keep their meaning all along:
;   r15 status block   r14 first page of the share   r13 pages in it   r12 its hot pages   rbx what follows
;   r8, r9, r10 the pace: cycles a page (0 for flat out), when the next page is due, how late is too late
;   xmm2 STEP * 2, twice
; The subroutines use rax, rcx, rdx, rdi, xmm0, xmm1, xmm3 freely.

; What a vCPU keeps at [rbx], on its stack
LAP_STEPS  equ 0                ; steps in a lap
DEGREE     equ 8                ; random: m; zipf: the number of classes
LAP        equ 16
COLD_FIRST equ 24               ; the lap's sixteenth: its first page,
COLD_PAGES equ 32               ; how many it has, the hot ones among them included,
COLD_NEXT  equ 40               ; and the first that has not been verified
CPUS       equ 48
LOCALS     equ 64

start:
    sub rsp, LOCALS
    mov rbx, rsp
    mov [rbx + CPUS], rsi
    mov r15, rdi
    shl r15, 6
    add r15, STATUS
    mov r11, rcx                        ; TSC kHz

    mov rbp, rdx                        ; memory
    sub rbp, BOUNDARY
    shr rbp, 12
    call part
    mov r14, rax
    inc rdi
    call part
    mov r13, rax
    sub r13, r14
    mov rbp, [HOT]
    shr rbp, 12
    call part
    mov r12, rax
    dec rdi
    call part
    sub r12, rax

    imul r10, r11, 1000                 ; a second late: no use in catching up
    xor r8d, r8d
    xor r9d, r9d                        ; long ago, so wait_for_slot begins with now
    cmp qword [PACE], 0
    je pace_known
    mov rax, r10
    xor edx, edx
    div qword [PACE]
    mov r8, rax
pace_known:

    mov [rbx + LAP_STEPS], r12
    cmp qword [PATTERN], 1
    jb pattern_known
    je for_random
    bsr rcx, r12
    inc rcx
    mov [rbx + DEGREE], rcx
    jmp pattern_known
for_random:
    lea rax, [r12 - 1]                  ; the bits that the last page's number has
    bsr rcx, rax
    lea rcx, [rcx + 1]
    jnz bits_known
    xor ecx, ecx
bits_known:
    mov [rbx + DEGREE], rcx
    test r12, r12                       ; without a page there is no step
    jz pattern_known
    mov eax, 1
    shl rax, cl
    mov [rbx + LAP_STEPS], rax
pattern_known:

    mov rax, STEP * 2
    movq xmm2, rax
    punpcklqdq xmm2, xmm2

    mov [r15 + S_PAGES], r13
    mov rax, MAGIC
    mov [r15 + S_MAGIC], rax

    xor esi, esi                        ; generation
    xor r11d, r11d                      ; page of the share
fill:
    cmp r11, r13
    jae filled
    mov rax, r11
    call page_address
    call write_page
    inc r11
    mov [r15 + S_FILLED], r11
    jmp fill
filled:
    mov qword [rbx + LAP], 0

lap:
    mov rax, [rbx + LAP]                ; cold pages: a sixteenth of the share
    and eax, 15
    mov rcx, r13
    imul rcx, rax
    lea rdx, [rcx + r13]
    shr rcx, 4
    shr rdx, 4
    sub rdx, rcx
    mov [rbx + COLD_FIRST], rcx
    mov [rbx + COLD_NEXT], rcx
    mov [rbx + COLD_PAGES], rdx

    xor r11d, r11d                      ; step of the lap
step:
    cmp r11, [rbx + LAP_STEPS]
    jae steps_done
    call whose_turn
    cmp rax, r12
    jae nobody
    imul rax, [STRIDE]
    call page_address
    test r8, r8
    jz in_its_turn
    call wait_for_slot
in_its_turn:
    call verify_page
    inc rsi
    call write_page
nobody:
    inc qword [r15 + S_PROGRESS]
    inc r11
    mov rax, [rbx + COLD_PAGES]
    mul r11
    div qword [rbx + LAP_STEPS]
    call verify_cold
    jmp step
steps_done:
    mov rax, [rbx + COLD_PAGES]         ; where there is no hot page there was no step
    call verify_cold

    mov rax, [rbx + LAP]
    inc rax
    mov [rbx + LAP], rax
    mov [r15 + S_LAPS], rax
    test al, 15
    jnz lap
    call print_letter
    jmp lap


; rax = hot page whose turn the next step is, rsi = its generation. r11 is the step's number in its lap.
whose_turn:
    cmp qword [PATTERN], 1
    je shuffle
    ja take_turns
    mov rax, r11
    mov rsi, [rbx + LAP]
    ret

shuffle:
    mov rsi, [rbx + LAP]
    mov rdi, C1                         ; the lap's key
    imul rdi, rsi
    mov rax, C3
    add rdi, rax
    mov rcx, [rbx + DEGREE]
    mov edx, 1
    shl rdx, cl
    dec rdx                             ; the mask
    shr ecx, 1
    inc ecx                             ; how far its upper half is shifted onto the lower one
    lea rax, [r11 + rdi]
    shr rdi, 17
    or rdi, 1
    imul rax, rdi                       ; odd, so nothing is lost
    and rax, rdx
    mov rdi, rax
    shr rdi, cl
    xor rax, rdi
    mov rdi, C1
    imul rax, rdi
    and rax, rdx
    mov rdi, rax
    shr rdi, cl
    xor rax, rdi
    ret

take_turns:
    mov rax, [r15 + S_PROGRESS]
    xor edx, edx
    div qword [rbx + DEGREE]              ; rax the classes' turn, rdx the class
    mov ecx, edx
    mov rsi, rax
    shr rsi, cl                         ; every page of the class has had so many turns, or one more
    mov edx, 1
    shl rdx, cl
    dec rdx
    and rax, rdx
    add rax, rdx
    ret

; Verify the cold ones of the lap's first rax pages, as far as they have not been.
verify_cold:
    add rax, [rbx + COLD_FIRST]
    mov rbp, rax
cold:
    mov rax, [rbx + COLD_NEXT]
    cmp rax, rbp
    jae cold_done
    xor edx, edx
    div qword [STRIDE]
    test rdx, rdx
    jnz is_cold
    cmp rax, r12
    jb cold_next                        ; hot: its turn comes
is_cold:
    mov rax, [rbx + COLD_NEXT]
    call page_address
    xor esi, esi
    call verify_page
cold_next:
    inc qword [rbx + COLD_NEXT]
    jmp cold
cold_done:
    ret

; rax = rbp * rdi / CPUS: where the share of vCPU rdi begins when rbp pages are dealt out
part:
    mov rax, rbp
    mul rdi
    div qword [rbx + CPUS]
    ret

; rdi = address of page rax of the share
page_address:
    lea rdi, [rax + r14]
    shl rdi, 12
    add rdi, BOUNDARY
    mov rax, HOLE
    cmp rdi, rax
    jb below_hole
    add rdi, HOLE_SIZE
below_hole:
    ret

; rax = z of the first word of the page at rdi, generation rsi; rcx = STEP
first_z:
    mov rax, rdi
    shr rax, 12
    mov rcx, C1
    imul rax, rcx
    mov rcx, C2
    imul rcx, rsi
    add rax, rcx
    mov rcx, C3
    add rax, rcx
    mov rcx, STEP
    ret

; xmm0 = z of the first two words
first_pair:
    call first_z
    movq xmm0, rax
    add rax, rcx
    movq xmm1, rax
    punpcklqdq xmm0, xmm1
    ret

; xmm1 = the two words that belong to xmm0
%macro WORDS 0
    movdqa xmm1, xmm0
    psrlq xmm1, 32
    pxor xmm1, xmm0
    paddq xmm0, xmm2
%endmacro

%macro WRITE 1
    WORDS
    movdqa oword [rdi + rcx + %1], xmm1
%endmacro

%macro VERIFY 1
    WORDS
    pcmpeqd xmm1, oword [rdi + rcx + %1]
    pand xmm3, xmm1
%endmacro

; Give the page at rdi generation rsi.
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

; Return if all of the page at rdi is of generation rsi, and fail otherwise.
verify_page:
    call first_pair
    xor ecx, ecx
    pcmpeqd xmm3, xmm3                  ; all ones as long as every word was right
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

; Spin until the next page is due. The clock may jump when the guest is moved: the wait is never longer than
; one page's time from now, and a guest that is far too late does not run to catch up.
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


; The page at rdi is not of generation rsi: say so, and end.
find_wrong_word:
    inc qword [r15 + S_FAILURES]
    call first_z
    xor ebx, ebx                        ; word
next_word:
    mov r12, rax
    shr r12, 32
    xor r12, rax                        ; expected
    mov r13, qword [rdi + rbx * 8]      ; found
    cmp r12, r13
    jne say_it
    add rax, rcx
    inc ebx
    cmp ebx, 512
    jb next_word
    dec ebx                             ; all is right again? say so by printing the last word
say_it:
    call lock_serial                    ; for good: nobody prints after this line
    lea rsi, [rel text_fail]
    call print_text
    mov rax, r15
    sub rax, STATUS
    shr rax, 6
    call print_decimal
    lea rsi, [rel text_page]
    call print_text
    mov r8, rdi
    shr r8, 12
    call print_hex
    lea rsi, [rel text_word]
    call print_text
    mov rax, rbx
    call print_decimal
    lea rsi, [rel text_expected]
    call print_text
    mov r8, r12
    call print_hex
    lea rsi, [rel text_found]
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

; The letter of pass rax / 16
print_letter:
    shr rax, 4
    dec rax
    mov ebp, 26
    mov ecx, 'A'
    mov rsi, r15
    sub rsi, STATUS
    jz letter_known
    mov ecx, 'a'
    cmp rsi, 64
    je letter_known
    mov ebp, 10
    mov ecx, '0'
letter_known:
    xor edx, edx
    div rbp
    add ecx, edx
    call lock_serial
    call print_char
    mov dword [rel serial_lock], 0
    ret

lock_serial:
    mov eax, 1
    xchg dword [rel serial_lock], eax
    test eax, eax
    jz locked
    pause
    jmp lock_serial
locked:
    ret

; Print the character in cl.
print_char:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       ; THRE: the transmit register takes another byte
    jz print_char
    mov dx, SERIAL
    mov al, cl
    out dx, al
    ret

; Print the text at rsi.
print_text:
    mov cl, byte [rsi]
    test cl, cl
    jz text_done
    call print_char
    inc rsi
    jmp print_text
text_done:
    ret

; Print eax, which is less than 1000.
print_decimal:
    xor r9d, r9d                        ; digits so far
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

; Print r8 as 0x and its hexadecimal digits.
print_hex:
    mov cl, '0'
    call print_char
    mov cl, 'x'
    call print_char
    mov r9d, 16
skip_zeros:                             ; at most fifteen of them
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

text_fail:     db 10, "FAIL dirtier: vcpu ", 0
text_page:     db " page ", 0
text_word:     db " word ", 0
text_expected: db ": expected ", 0
text_found:    db ", found ", 0

align 4096                              ; STATUS: code is never on a page that is written
    times 16 * 64 db 0
serial_lock:
    dd 0
